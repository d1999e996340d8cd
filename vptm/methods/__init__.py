"""Published methods that are more than a setting: SPT, ProVP-Ref, ProtoVerb, reprogramming."""
