"""What `vptm/assets/backbones.json` holds: kind and parameters of every timm architecture that opens.

`python -m tools.backbone_table` writes it anew, which takes half a minute: each is built without memory.
"""

from __future__ import annotations

import json
from pathlib import Path

from vptm.inspection.catalogue import architectures, looked_up

TABLE = Path(__file__).parent.parent / "vptm" / "assets" / "backbones.json"


def main() -> None:
    """Build every architecture and write the table."""
    found = {name: looked_up(name) for name in architectures()}
    lines = [f'  "{name}": {json.dumps(list(facts))}' for name, facts in sorted(found.items()) if facts is not None]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
