"""Random allocation problems."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from edgewright.ops.packing import period
from edgewright.quant.allocator import Problem
from edgewright.quant.expected_error import expected_error
from edgewright.quant.overrides import Override
from edgewright.quant.plan import Unit, WeightSpec, weight_bytes
from edgewright.quant.rtn import effective_group
from edgewright.targets.storage import legal_choices, legal_group, signed_scales

WIDTHS = ((2, 3, 4, 5, 6, 8), (2, 4, 8), (3, 4, 6, 8), (4, 8), (4, 5, 6, 8, 16), (2, 3, 4))


GROUPS = ((32, 64, 128), (16, 32), (64,), (0,), (32, 128, 0))


TARGETS = ((), (), ("onnx",), ("executorch",), ("coreml",), ("tensorrt",), ("onnx", "qnn"), ("onnx", "executorch"))


@dataclass
class Random:
    """A random model of 4 to 60 units: fused ones, an embedding that stands for a tied head too, some overridden."""

    problem: Problem
    rows: list[list[tuple[int, float]]]  # of each unit (bytes, loss) of all it could take

    @property
    def ends(self) -> tuple[int, int]:
        """Bytes of the smallest plan, and of the one of least loss with fewest bytes."""
        best = [min(row, key=lambda option: (option[1], option[0])) for row in self.rows]
        return sum(min(b for b, _ in row) for row in self.rows), sum(b for b, _ in best)


def random_case(seed: int) -> Random:
    chance = random.Random(seed)
    wide = [32, 48, 64, 96, 128, 160, 256]
    units = [Unit("embed", [WeightSpec("embed.weight", (chance.randrange(40, 200), chance.choice(wide)), None, "x")])]
    for layer in range(chance.choice([1, 1, 2, 3, 5, 8, 14])):
        columns = chance.choice(wide)
        fused = [WeightSpec(f"l.{layer}.{p}", (chance.randrange(1, 40), columns), layer, "x") for p in "qkv"]
        units.append(Unit(f"l.{layer}.qkv", fused))
        for part in ("o", "up", "down"):
            shape = (chance.randrange(1, 80), chance.choice(wide))
            units.append(Unit(f"l.{layer}.{part}", [WeightSpec(f"l.{layer}.{part}", shape, layer, "x")]))
    overrides = []
    if chance.random() < 0.4:
        overrides.append(Override("^embed", chance.choice([8, 16])))
    if chance.random() < 0.3:
        overrides.append(Override(r"l\.0\..*", chance.choice([4, 8])))
    scores = {unit.name: chance.choice([1.0, 4.0, chance.uniform(0.5, 16)]) for unit in units}
    widths, groups, targets = chance.choice(WIDTHS), chance.choice(GROUPS), chance.choice(TARGETS)
    widths = (*widths, 8) if 8 not in widths else widths  # so that every shape has a choice
    problem = Problem(units, scores, chance.randrange(5000), widths, groups, overrides, targets)
    return Random(problem, [possible(problem, unit) for unit in units])


def possible(problem: Problem, unit: Unit) -> list[tuple[int, float]]:
    """By the tables of widths and targets alone: (bytes, loss) of every choice of the unit."""
    override = next((o for o in problem.overrides if any(re.search(o.regex, w.name) for w in unit.weights)), None)
    widths = problem.widths if override is None else (override.bits,)
    found = []
    for bits, wanted in legal_choices(problem.targets, widths, problem.groups):
        sized = [(w, w.shape[1] if bits == 16 else effective_group(w.shape[1], wanted)) for w in unit.weights]
        if bits != 16 and any(
            w.shape[1] % period(bits)
            or not (group == w.shape[1] or all(legal_group(target, bits, group) for target in problem.targets))
            for w, group in sized
        ):
            continue
        loss = sum(w.numel * expected_error(bits, group, signed_scales(problem.targets)) for w, group in sized)
        found.append((sum(weight_bytes(w, bits, group) for w, group in sized), problem.scores[unit.name] * loss))
    assert found
    return found
