"""Labels of images: finding which belong together (`pairing`), reading their forms (`sources`), checking (`checks`).

Everything that is wrong with a labelled set is found before training and reported at once, one sentence per cause.
This module itself holds only what everybody else needs.
"""

IGNORE = -1
"""Label of a pixel that is neither trained on nor scored: what `finetune.ignore_label` becomes, and the padding."""
