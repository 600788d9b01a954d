"""The method as pure functions, in the order of the maths.

=================  =============================================================================
``spec``           what a lens is made of, which parts train
``decoder``        activation → text
``gumbel``         sampling a token with a gradient; ``estimators``: its backward rules;
                   ``vocabulary``: the same for whole texts; ``history``: the gradient through
                   a text's own earlier tokens; ``policy``: score-function gradients
``encoder``        text → activation
``original``       capture from M, and the swap (activation patching)
``losses``         the terms; ``objective``: their weighted sum; ``schedules``: the weights
=================  =============================================================================

Array names end in the letters of their dimensions:

    B  rows of a batch; in the joint loss their texts, k per row
    R  rows, where B counts texts: B = R k
    k  samples of an estimator: texts per row, or draws of Gumbel-Rao
    G  contexts (documents) of a batch; B / G neighbouring rows share one
    S  positions of a sequence: a context, or a prompt with its text
    T  tokens of a text; t: all but the last, T − 1
    h  positions predicted from P on, P … P + h − 1
    p  prompt vectors
    D  width of the residual stream; O: the second width of a square matrix
    V  vocabulary
    N  layers; n: layers whose input is patched
    E  experts; r: rank of an adapter

Single letters in formulas: M the original model, L its layer, P the position, a the activation,
â its reconstruction, ã the vector that is swapped in.
"""
