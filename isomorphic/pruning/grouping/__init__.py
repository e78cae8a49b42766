"""The exact tracer of coupled channels.

The model runs once, eagerly, and beside each tensor travels *which unit every position of an axis belongs to*: an
integer id for each channel. Parameters and buffers are where ids begin (one for each position of each dim). Data
movement moves ids exactly as it moves data, so that nothing is inferred from shapes. Computation couples them:
element-wise operations unite the ids of their operands, a contraction unites the two axes that it sums over, and its
result keeps the outer ones. Units are the connected classes of ids; what a class occupies in the parameters is cut
together.

    trace.py            the face of step 1: `trace_groups(model, inputs, tracer)`
    units.py            the ids: allocation, union, freezing, rows of equally many units
    axes.py             data movement: views, permutations, slices, concatenations, broadcasts
    rules/              one line an operation: how its result's axes follow from its arguments'
    topology.py         which layer's output reaches which layer: the graphs that isomorphism compares
    integers.py         integers of the forward code that remember where they come from
    size_equations.py   sizes that the forward code spells out, as equations over the groups' sizes
    size_arguments.py   which sizes each function is given
    multihead.py        torch's multi-head attention, written out
    recorder.py         the notes of one trace: which units every tensor carries, who uses what a layer made
    call.py             one call of an operation, as its rule sees it
    unit_mode.py        the mode that watches a forward pass and applies the rules
    unit_groups.py      from classes of ids to units, and which of them belong together
    assembly.py         from units to coupled groups
    shrink_together.py  from equations to groups that shrink together, or stay
    exact.py            the exact tracer's face: `trace(model, inputs)`
    trial.py            half of everything is cut from a copy without data, to see that the forward code agrees
    depgraph.py         the other tracer: an adapter to torch-pruning's DependencyGraph

Two rules keep it honest. An axis longer than one that carries no ids (pixels, tokens, batch) is fixed, and freezes
whatever it is combined with. An operation without a rule freezes what it touches, and is named.
"""
