"""Training recipes: each file shows one thing that sequence models do, from the data to the trained model.

RECIPES: what `seqfuse train` knows, by name. A new recipe is one file (see base.py) and one name here.
"""

from seqfuse.recipes import align, awd_lstm, bert_mlm, bottleneck, charlm, class_to_text, gpt, translate
from seqfuse.recipes.base import Recipe

_MODULES = (charlm, awd_lstm, bottleneck, translate, gpt, bert_mlm, class_to_text, align)

RECIPES: dict[str, Recipe] = {module.RECIPE.name: module.RECIPE for module in _MODULES}
