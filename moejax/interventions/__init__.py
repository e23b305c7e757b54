"""What changes the logits of trained routers without changing a weight.

An intervention is a registered dataclass of arrays that is called as `(logits [T, E], context) ->
logits [T, E]`, between a router's projection and its softmax. `model.apply` takes one for every
stack of layers, its arrays stacked likewise (`stacked.stacked`); one idea per file.
"""
