"""The table of names of a layout: which tensor of ours is which tensor of theirs, and the few ways in which they differ.

A table is rows (ours, theirs) or (ours, theirs, change); the first row that fits a name counts. In both columns `*` stands
for one part of a name and `**` for the rest of it. `{a,b}` in theirs lists several tensors that are one of ours: parts to be
joined, or what the row's change makes of them. `a?` may be missing and is never written, `a+` may be missing and is written.
A buffer called `position_ids` counts 0, 1, 2, ..., which is checked. Every tensor of the model has a row, and every tensor of
a file a place, or it is an error that lists it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from capfilt.errors import UserError
from capfilt.models.common.layouts.contents import reason
from capfilt.models.common.weights import listed


class Change(NamedTuple):
    """How tensors of theirs become ours, and back.

    read(found, wanted): by name the tensors of theirs that are there, in the row's order, and ours, whose values are not set.
    write(tensor, count): as many tensors of theirs as the row names. ValueError says that tensors contradict each other.
    """

    read: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    write: Callable[[Tensor, int], Sequence[Tensor]] = lambda tensor, count: [tensor] * count


Row = tuple[str, str] | tuple[str, str, Change]
Rows = tuple[Row, ...]


GEOMETRY = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""What transformers calls a transformer's width, depth, heads and hidden width in a config."""
VIT_BLOCK = {
    "norm1": "layernorm_before", "attn.qkv": "attention.attention.{query,key,value}", "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
"""Modules of a block of transformers' ViT, DeiT and ViLT."""


def under(ours: str, theirs: str, modules: Mapping[str, str]) -> Rows:
    """Rows for the modules of numbered blocks, weights and biases."""
    return tuple((f"{ours}.*.{each}.*", f"{theirs}.*.{other}.*") for each, other in modules.items())


# ---------------------------------------------------------------------- changes


def _first(found: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """The first tensor, of which the rest are copies."""
    (name, main), *rest = found.items()
    for other, copy in rest:
        if not torch.equal(copy, main):
            raise ValueError(f"{other} is not {name}, which it is tied to")
    return main


def _bare(tensor: Tensor) -> Tensor:
    while tensor.dim() > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def _with_types(found: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    positions, *types = found.values()
    return positions + types[0][0] if types else positions


def longer(rows: int, value: float) -> Change:
    """Ours has so many rows more, which hold `value` after reading; other tensors of theirs are copies."""

    def read(found: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
        tensor = _first(found, wanted)
        return torch.cat([tensor, tensor.new_full((rows, *tensor.shape[1:]), value)])

    return Change(read, lambda tensor, count: [tensor[:-rows]] * count)


JOINED = Change(
    lambda found, wanted: torch.cat([*found.values()]) if len(found) > 1 else next(iter(found.values())),
    lambda tensor, count: tensor.chunk(count) if count > 1 else [tensor],
)
COPIED = Change(_first)
TRANSPOSED = Change(
    lambda found, wanted: _first(found, wanted).T.contiguous(), lambda tensor, count: [tensor.T]
)
BARE = Change(
    lambda found, wanted: _first(found, wanted).reshape(wanted.shape), lambda tensor, count: [_bare(tensor)]
)
"""Theirs has no dimension of a batch."""
TYPED = Change(_with_types, lambda tensor, count: [tensor, tensor.new_zeros(2, tensor.shape[1])][:count])
"""Positions and BERT's token types: every word has the first type, whose row is part of the positions here."""


# ---------------------------------------------------------------------- reading and writing


class _Source(NamedTuple):
    name: str
    needed: bool
    written: bool

    @property
    def counts(self) -> bool:
        return self.name.endswith("position_ids")


def take(
    path: Path, who: str, rows: Rows, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors under our names, leftovers under theirs) of `found`; floats become fp32, which loses nothing.

    wanted: our tensors by name, values unset. UserError lists names that are missing, and names that no `who` has and
    that have no known `reason`.
    """
    rest = dict(found)
    state: dict[str, Tensor] = {}
    missing: list[str] = []
    for ours, sources, change in _matched(rows, wanted):
        there = {each.name: rest.pop(each.name) for each in sources if each.name in rest}
        there = {name: each.float() if each.is_floating_point() else each for name, each in there.items()}
        for name in [each.name for each in sources if each.counts and each.name in there]:
            if there.pop(name).flatten().tolist() != list(range(found[name].numel())):
                raise UserError(
                    f"{path}: {name} does not count 0, 1, 2, ...: no {who} reads positions in that order"
                )
        lacking = [each.name for each in sources if each.needed and each.name not in there]
        if lacking or not there:
            missing += lacking or [sources[0].name]
            continue
        try:
            state[ours] = change.read(there, wanted[ours])
        except ValueError as error:
            raise UserError(f"{path}: {error} in every {who}") from error
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in there.items())
            raise UserError(f"{path}: no {who} has tensors of these shapes: {shapes}") from error
    leftovers = {name: rest.pop(name) for name in sorted(rest) if reason(name)}
    faults = [
        f"{len(names)} tensors {kind}: {listed(sorted(names))}; {cure}"
        for kind, names, cure in (
            ("missing", missing, "the file is not whole"),
            (f"that no {who} of this kind has", [*rest], "remove them from the file if they are not needed"),
        )
        if names
    ]
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}")
    return state, leftovers


def give(rows: Rows, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names of ours: the inverse of `take`."""
    made: dict[str, Tensor] = {}
    for ours, sources, change in _matched(rows, own):
        plain = [each for each in sources if not each.counts]
        tensors = change.write(own[ours], len(plain))
        made |= {each.name: tensor for each, tensor in zip(plain, tensors, strict=True) if each.written}
        counted = torch.arange(len(tensors[0]))[None] if len(plain) < len(sources) else None
        made |= {
            each.name: counted for each in sources if each.counts and each.written and counted is not None
        }
    return made


def _matched(rows: Rows, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, list[_Source], Change]]:
    compiled = [
        (re.compile(re.escape(row[0]).replace(r"\*\*", "(.+)").replace(r"\*", "([^.]+)")), row)
        for row in rows
    ]
    for name in ours:
        fits = next(((hit, row) for pattern, row in compiled if (hit := pattern.fullmatch(name))), None)
        if fits is None:
            raise KeyError(f"the table of names has no row for {name}")
        hit, row = fits
        change = row[2] if len(row) > 2 else JOINED
        yield name, [*_sources(row[1], hit.groups())], change


def _sources(pattern: str, parts: tuple[str, ...]) -> Iterator[_Source]:
    for part in parts:
        head, _, tail = pattern.replace("**", "*").partition("*")
        pattern = head + part + tail
    head, _, rest = pattern.partition("{")
    inside, _, tail = rest.partition("}")
    for each in inside.split(","):
        name = head + each + tail
        yield _Source(re.sub("[?+]", "", name), not {"?", "+"} & set(name), "?" not in name)
