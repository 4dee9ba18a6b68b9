"""`block_ffn`: the identities F1 to F7 of docs/methods.md, and every backend against the oracle."""

import pytest
import torch
from torch import Tensor

from megatron_sffn.ops import Activation, ClampedActivation, block_ffn
from megatron_sffn.ops.activation import AnyActivation
from megatron_sffn.ops.block_ffn import Pairs, block_ffn_pairs, cpu, torch_backend
from megatron_sffn.utils.errors import ConfigError

BACKENDS = ["naive", "torch", "cpu"]
CLAMPED = ClampedActivation(Activation.QUICK_GEGLU, clamp=1.5, offset=1.0)
"""As in gpt-oss, but with a clamp that acts on many of the numbers here."""
ACTIVATIONS = [*Activation, CLAMPED]
T, D, M = 13, 6, 24


def tensors(
    g: int, activation: AnyActivation = Activation.GELU, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """x `[T, D]`, keys and values of M cells in blocks of g."""
    torch.manual_seed(g)
    rows = g * (2 if activation.gated else 1)
    x = torch.randn(T, D, dtype=dtype)
    keys, values = torch.randn(M // g, rows, D, dtype=dtype), torch.randn(M // g, g, D, dtype=dtype)
    return x, keys, values


def random_ids(num_blocks: int, active: int, tokens: int = T) -> Tensor:
    return torch.rand(tokens, num_blocks).topk(active, dim=1).indices


def dense(x: Tensor, keys: Tensor, values: Tensor, activation: AnyActivation) -> Tensor:
    """`f(x Kᵀ) V` with all cells, computed without blocks."""
    if activation.gated:
        gate, linear = keys.chunk(2, dim=1)
        up = torch.cat((x @ gate.flatten(0, 1).T, x @ linear.flatten(0, 1).T), dim=1)
    else:
        up = x @ keys.flatten(0, 1).T
    return activation(up) @ values.flatten(0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("g", [1, 2, 3, 4, 6, 8, 12, 24])
def test_f1_f2_all_blocks_are_the_dense_ffn(
    g: int, activation: AnyActivation, backend: str
) -> None:
    x, keys, values = tensors(g, activation)
    all_ids = torch.arange(M // g).expand(T, -1)
    y = block_ffn(x, keys, values, all_ids, activation=activation, backend=backend)
    torch.testing.assert_close(y, dense(x, keys, values, activation), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_f4_order_of_blocks_and_of_cells_does_not_matter(backend: str) -> None:
    x, keys, values = tensors(4)
    ids, gates = random_ids(6, 3), torch.rand(T, 3, dtype=x.dtype)
    y = block_ffn(x, keys, values, ids, gates, backend=backend)
    block_order = torch.randperm(6)
    y_blocks = block_ffn(
        x,
        keys[block_order],
        values[block_order],
        block_order.argsort()[ids],
        gates,
        backend=backend,
    )
    torch.testing.assert_close(y_blocks, y, rtol=1e-10, atol=1e-12)
    cell_order = torch.randperm(4)
    y_cells = block_ffn(x, keys[:, cell_order], values[:, cell_order], ids, gates, backend=backend)
    torch.testing.assert_close(y_cells, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_f5_a_token_does_not_depend_on_its_batch(backend: str) -> None:
    x, keys, values = tensors(4)
    ids = random_ids(6, 2)
    y = block_ffn(x, keys, values, ids, backend=backend)
    order = torch.randperm(T)
    shuffled = block_ffn(x[order], keys, values, ids[order], backend=backend)
    torch.testing.assert_close(shuffled, y[order], rtol=1e-10, atol=1e-12)
    alone = block_ffn(x[5:6], keys, values, ids[5:6], backend=backend)
    torch.testing.assert_close(alone, y[5:6], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_f6_unselected_cells_get_exactly_no_gradient(backend: str) -> None:
    x, keys, values = (t.requires_grad_() for t in tensors(4))
    block_ffn(x, keys, values, torch.tensor([[0, 2]] * T), backend=backend).sum().backward()
    for table in (keys, values):
        assert table.grad is not None
        assert table.grad[[1, 3, 4, 5]].abs().max() == 0
        assert (table.grad[[0, 2]] != 0).any(dim=2).all()


@pytest.mark.parametrize("gated_output", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("g", [1, 3, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_f7_output_and_gradients_are_those_of_the_masked_dense_ffn(
    backend: str, g: int, activation: AnyActivation, gated_output: bool
) -> None:
    blocks = M // g
    ids = random_ids(blocks, max(1, blocks // 3))
    gates = torch.rand(ids.shape, dtype=torch.float64) if gated_output else None
    results = []
    for method in (backend, "formula"):
        x, keys, values = (t.requires_grad_() for t in tensors(g, activation))
        factors = None if gates is None else gates.clone().requires_grad_()
        if method == "formula":
            weight = torch.ones(ids.shape, dtype=x.dtype) if factors is None else factors
            mask = torch.zeros(T, blocks, dtype=x.dtype).scatter(1, ids, weight)
            up = torch.stack([x @ keys[i].T for i in range(blocks)], dim=1)
            coefficients = activation(up) * mask[:, :, None]
            y = coefficients.flatten(1) @ values.flatten(0, 1)
        else:
            y = block_ffn(x, keys, values, ids, factors, activation=activation, backend=method)
        (y * torch.arange(D, dtype=y.dtype)).sum().backward()
        grads = [t.grad for t in (x, keys, values)] + ([] if factors is None else [factors.grad])
        results.append([y.detach(), *grads])
    for actual, formula in zip(*results, strict=True):
        torch.testing.assert_close(actual, formula, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_hand_written_backward_is_the_derivative(
    activation: AnyActivation, backend: str
) -> None:
    x, keys, values = tensors(3, activation)
    inputs = [
        t[:4].clone().requires_grad_() if t is x else t.requires_grad_() for t in (x, keys, values)
    ]
    gates = torch.rand(4, 2, dtype=x.dtype, requires_grad=True)
    ids = random_ids(8, 2, tokens=4)
    # These inputs are away from the kink of ReLU, where finite differences are wrong.
    assert torch.autograd.gradcheck(
        lambda x, k, v, g: block_ffn(x, k, v, ids, g, activation=activation, backend=backend),
        (*inputs, gates),
    )


def pairs_of(case: str) -> Pairs:
    """Edge cases of the (row, block) pairs, for T rows and 6 blocks."""
    if case == "all to one block":
        rows, blocks = torch.arange(T), torch.full((T,), 4)
    elif case == "no pair at all":
        rows = blocks = torch.zeros(0, dtype=torch.long)
    elif case == "one row has every block":
        rows, blocks = torch.full((6,), 7), torch.arange(6)
    else:
        rows, blocks = torch.tensor([0, 0, 3, 12]), torch.tensor([5, 0, 0, 2])
    return Pairs(rows=rows.int(), blocks=blocks.int())


@pytest.mark.parametrize(
    "case", ["all to one block", "no pair at all", "one row has every block", "ragged"]
)
@pytest.mark.parametrize("scratch", [1, 1 << 20])
def test_edge_cases_agree_with_the_oracle(
    case: str, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "SCRATCH_BYTES", scratch)
    monkeypatch.setattr(torch_backend, "SMALLEST_PIECE", 3)
    results = []
    for backend in BACKENDS:
        x, keys, values = (t.requires_grad_() for t in tensors(4))
        y = block_ffn_pairs(x, keys, values, pairs_of(case), backend=backend)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, keys.grad, values.grad])
    for naive, *fast in zip(*results, strict=True):
        for actual in fast:
            torch.testing.assert_close(actual, naive, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("g", [1, 2, 3, 7, 16, 33, 100])
@pytest.mark.parametrize("rows, width", [(2500, 40), (300, 301), (2, 16)])
def test_sizes_that_do_not_fit_tiles_agree_with_the_oracle(
    rows: int, width: int, g: int, dtype: torch.dtype
) -> None:
    """One block has all rows, one has none, the others have some."""
    torch.manual_seed(g)
    blocks = max(5, 1500 // g if width == 40 else 0)
    x = torch.randn(rows, width, dtype=torch.float64)
    keys, values = torch.randn(2, blocks, g, width, dtype=torch.float64) * width**-0.5
    is_pair = torch.rand(rows, blocks) < torch.linspace(0.0, 0.1, blocks)
    is_pair[:, 3] = True
    is_pair[rows // 2] = False
    indices = is_pair.nonzero().int()
    pairs = Pairs(rows=indices[:, 0].contiguous(), blocks=indices[:, 1].contiguous())
    gates = torch.rand(len(indices), dtype=torch.float64)
    results = []
    for backend, compute_dtype in (("torch", torch.float64), ("cpu", dtype)):
        inputs = [t.to(dtype).to(compute_dtype).requires_grad_() for t in (x, keys, values, gates)]
        y = block_ffn_pairs(*inputs[:3], pairs, inputs[3], backend=backend)
        (y * x.to(dtype).to(compute_dtype)).sum().backward()
        results.append([y.detach(), *(t.grad for t in inputs)])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for exact, actual in zip(*results, strict=True):
        error = (actual.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
        assert error < tolerance, f"relative error {error:.2e}"


def test_no_tokens_give_no_output() -> None:
    _, keys, values = tensors(4)
    x = torch.zeros(0, D, dtype=keys.dtype, requires_grad=True)
    y = block_ffn(x, keys, values, torch.zeros(0, 2, dtype=torch.long))
    y.sum().backward()
    assert y.shape == (0, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("few_cells", [1, 64])
def test_narrow_dtypes_stay_near_the_float64_oracle(
    few_cells: int, activation: AnyActivation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "FEW_CELLS", few_cells)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    ids = random_ids(12, 5)
    results = []
    for backend, width in (("naive", torch.float64), ("cpu", dtype)):
        # The oracle starts from the rounded inputs, whose rounding is not an error of the op.
        inputs = [t.to(dtype).to(width).requires_grad_() for t in tensors(2, activation)]
        y = block_ffn(*inputs, ids, activation=activation, backend=backend)
        assert y.dtype == width
        y.backward(torch.ones_like(y))
        results.append([y.detach().double(), *(t.grad.double() for t in inputs)])
    for exact, actual in zip(*results, strict=True):
        error = (actual - exact).norm() / exact.norm()
        assert error < tolerance, f"relative error {error:.2e}"


def test_results_are_the_same_bits_every_time() -> None:
    x, keys, values = tensors(2, dtype=torch.float32)
    ids = random_ids(12, 5)
    first = block_ffn(x, keys, values, ids)
    assert all(torch.equal(block_ffn(x, keys, values, ids), first) for _ in range(3))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"activation": "swiglu"}, ("swiglu", "(6, 8, 6)")),
        ({"activation": "tanh"}, ("tanh", "squared_relu")),
        ({"backend": "cuda"}, ("cuda", "triton")),
        ({"x": torch.zeros(T, D)}, ("x is torch.float32", "one dtype")),
        ({"x": torch.zeros(T, D + 1, dtype=torch.float64)}, ("(13, 7)", "(6, 4, 7)")),
        ({"x": torch.zeros(T, 1, D, dtype=torch.float64)}, ("x (13, 1, 6)", "[T, C]")),
        ({"values": torch.zeros(6, D, dtype=torch.float64)}, ("values (6, 6)", "[B, G, D]")),
        ({"keys": None}, ("without keys", "give keys")),
        ({"block_ids": torch.zeros(T - 1, 2).long()}, ("(12, 2)", "T = 13")),
        ({"block_ids": torch.zeros(T, 2)}, ("float32", "integers")),
        ({"gates": torch.zeros(T, 3, dtype=torch.float64)}, ("gates (13, 3)", "each id")),
        ({"gates": torch.zeros(T, 2, dtype=torch.float64, device="meta")}, ("gates is on meta",)),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_that_do_not_fit_are_refused(
    backend: str, change: dict[str, object], words: tuple[str, ...]
) -> None:
    x, keys, values = tensors(4)
    valid = {"x": x, "keys": keys, "values": values, "block_ids": random_ids(6, 2)}
    with pytest.raises(ConfigError) as caught:
        block_ffn(**{**valid, "backend": backend, **change})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "ids, words",
    [
        ([[0, 1], [6, 2]], ("block id 6", "[0, 6)", "1 of 4")),
        ([[0, 1], [3, 3]], ("block id 3", "twice in row 1")),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_checked_on_request(
    backend: str, ids: list[list[int]], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFFN_CHECK", "1")
    x, keys, values = tensors(4)
    block_ffn(x[:2], keys, values, torch.tensor([[0, 5], [-1, -1]]), backend=backend)
    with pytest.raises(ConfigError) as caught:
        block_ffn(x[:2], keys, values, torch.tensor(ids), backend=backend)
    assert all(word in str(caught.value) for word in words), caught.value


def test_pairs_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFFN_CHECK", "1")
    x, keys, values = tensors(4)
    for rows, words in (
        ([0, 13], "row 13 is not in"),
        ([-1, 0], "row -1"),
        ([1, 0], "must ascend"),
    ):
        pairs = Pairs(rows=torch.tensor(rows).int(), blocks=torch.tensor([0, 1]).int())
        with pytest.raises(ConfigError, match=words):
            block_ffn_pairs(x, keys, values, pairs)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_an_id_without_a_block_never_reaches_memory(backend: str) -> None:
    x, keys, values = tensors(4)
    with pytest.raises(IndexError):
        block_ffn(x, keys, values, torch.tensor([[0, 6]] * T), backend=backend)
