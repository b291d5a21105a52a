"""Training recipes: each file shows one thing that sequence models do, from the data to the trained model.

RECIPES: what `seqfuse train` knows, by name. A new recipe is one file (see base.py) and one name here.
"""

from seqfuse.recipes import awd_lstm, bert_mlm, bottleneck, charlm, g2p, gpt, translate
from seqfuse.recipes.base import Recipe

_MODULES = (g2p, charlm, awd_lstm, bottleneck, translate, gpt, bert_mlm)

RECIPES: dict[str, Recipe] = {module.RECIPE.name: module.RECIPE for module in _MODULES}
