"""One file of settings per published method; `recipe.py` reads them."""
