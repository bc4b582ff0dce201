"""Static shapes, no data-dependent Python, no host sync, pure updates: every kind of cache."""

import pytest
import torch
from impl_layers import KV_HEADS, WIDTH, model
from served_caches import BLOCK, KINDS, LENGTH, LINES, TABLES, Kind
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from impl import KVCacheManager
from impl.kv_cache import slot_mapping
from impl.slot_positions import first_positions, slot_positions

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


class Step(nn.Module):
    """Read, look up positions, update: all that a layer asks of its cache in a step."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        run = {"seq_len": LENGTH, "batch_size": LINES, **kind.run}
        scales = None if kind.scales is None else [kind.scales]
        self.manager = KVCacheManager(
            model(torch.float32, run=run, **kind.fields), kv_scales=scales
        )
        self.paged = "pa_block_size" in kind.run

    def forward(
        self, at: Tensor, seq_ids: Tensor, table: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the read K and V, the positions of their slots, and the updated cache."""
        manager = self.manager
        at = manager.seated(at, seq_ids)
        given = {"active_block_table": table} if self.paged else {}
        old_k, old_v = manager.get_kv_by_layer_id(0, seq_ids=seq_ids, **given)
        held = slot_positions(manager.layout(0), first_positions(at), old_v.shape[2])
        if self.paged:
            given["scatter_index"] = slot_mapping(table, at, BLOCK)
        new_k, new_v = manager.update_kv_by_layer_id(
            0, position_ids=at, kv_per_layer=(k, v), seq_ids=seq_ids, **given
        )
        return old_k, old_v, held, new_k, new_v


def arguments(kind: Kind, seq_len: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seq_len)
    at = torch.arange(seq_len) + torch.tensor([[3], [0], [9]])
    at = at.masked_fill(at > 8 + seq_len, -1)
    shape = (3, KV_HEADS, seq_len, WIDTH)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    return at, torch.tensor([2, -1, 0]), TABLES, k, v


# One of every code path; what differs in numbers alone is in the eager tests.
COMPILED = (
    "contiguous",
    "transposed",
    "tiled",
    "rolling, drafts",
    "rolling, window 1",
    "chunk",
    "paged",
    "paged, heads first",
    "core-sharded",
    "left-padded",
    "float8_e4m3fn",
    "int8, scale per channel",
)


@pytest.mark.parametrize("name", COMPILED)
def test_a_step_compiles_as_one_graph_and_computes_the_same(name: str) -> None:
    step, given = Step(KINDS[name]), arguments(KINDS[name], 2)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)
    for got, expected in zip(compiled(*given), step(*given), strict=True):
        assert torch.equal(got.float(), expected.float())
    for stored in step.manager.past_key_values:
        assert float(stored.float().abs().max()) == 0, "an update changed the cache itself"


@pytest.mark.parametrize("name", COMPILED)
def test_a_step_lowers_to_stablehlo_and_computes_the_same(name: str) -> None:
    pytest.importorskip("torch_mlir", reason="the extra stablehlo is not installed")
    pytest.importorskip("jaxlib", reason="the extra stablehlo is not installed")
    from conformance.stablehlo import Program, StableHLOBackend

    programs: list[Program] = []
    step, given = Step(KINDS[name]), arguments(KINDS[name], 2)
    torch._dynamo.reset()
    backend = StableHLOBackend(programs.append)
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    for got, expected in zip(compiled(*given), step(*given), strict=True):
        assert torch.equal(got.float(), expected.float())
    (program,) = programs
    assert program.is_static


@every_kind
def test_a_step_runs_on_fake_tensors(kind: Kind) -> None:
    step = Step(kind)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [mode.from_tensor(argument) for argument in arguments(kind, 4)]
        got = step(*given)
    for fake, real in zip(got, step(*arguments(kind, 4)), strict=True):
        assert fake.shape == real.shape
        assert fake.dtype is real.dtype


# torch.export warns about its own use of a deprecated check.
@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")
@pytest.mark.parametrize("name", ["rolling, drafts", "paged"])
def test_a_step_exports_without_mutation(name: str) -> None:
    step, given = Step(KINDS[name]), arguments(KINDS[name], 2)
    program = torch.export.export(step, given).run_decompositions({})
    assert not program.graph_signature.buffers_to_mutate
    assert not program.graph_signature.user_inputs_to_mutate
    for got, expected in zip(program.module()(*given), step(*given), strict=True):
        assert torch.equal(got, expected)


class InPlace(nn.Module):
    """A step that writes its tokens into the cache itself."""

    def __init__(self, manager: KVCacheManager) -> None:
        super().__init__()
        self.manager = manager

    def forward(self, at: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write, and read back."""
        self.manager.write_kv_by_layer_id(0, position_ids=at, kv_per_layer=(k, v))
        return self.manager.get_kv_by_layer_id(0)[1].sum()


def test_writing_in_place_keeps_the_storage_compiled_or_not() -> None:
    config = model(torch.float32, sliding_window=4)
    at = torch.tensor([[4], [7]])
    k, v = (torch.randn(2, KV_HEADS, 1, WIDTH) for _ in range(2))
    kept = KVCacheManager(config)
    kept.store(0, kept.update_kv_by_layer_id(0, position_ids=at, kv_per_layer=(k, v)))
    torch._dynamo.reset()
    eager, traced = InPlace(KVCacheManager(config)), InPlace(KVCacheManager(config))
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True, dynamic=False)
    for made, run in ((eager, eager), (traced, compiled)):
        places = [stored.data_ptr() for stored in made.manager.past_key_values]
        run(at, k, v)
        assert [stored.data_ptr() for stored in made.manager.past_key_values] == places
        for stored, expected in zip(
            made.manager.past_key_values, kept.past_key_values, strict=True
        ):
            assert torch.equal(stored, expected)
