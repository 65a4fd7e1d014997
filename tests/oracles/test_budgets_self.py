"""What holds over 50 steps of every dynamic method: budgets, zeros, moments, movement."""

from itertools import pairwise

import numpy as np
import pytest
from oracle import Oracle, adam, every, sgd

from oracles import adaptive, dynamic, gse, mest, neurons, pruning
from oracles.loop import by_scores, global_top_k, nnz

SHAPES = {"a": (6, 4), "b": (4, 8)}
INNERS = {"sgd": sgd(0.05, momentum=0.9), "adam": adam(0.02)}
DUE = every(5)


def normal(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape) for path, shape in SHAPES.items()}


PARAMS, TARGETS = normal(0), normal(1)
# Fan-in 2 in a and 1 in b, so that SRigL can start from them too: 8 and 8 entries.
FORWARD = {
    "a": np.arange(6)[:, None] // 2 == np.arange(4) % 3,
    "b": np.arange(4)[:, None] == np.arange(8) % 4,
}
START = {path: np.where(FORWARD[path], PARAMS[path], 0) for path in SHAPES}


def grad(alpha, step):
    noise = normal(100 + step)
    return {path: a - TARGETS[path] + 0.3 * noise[path] for path, a in alpha.items()}


def scores(step, path):
    return np.random.default_rng([step, len(path), ord(path)]).random(SHAPES[path])


def draw(step, path, k, allowed):
    return by_scores(scores(step, path))(k, allowed)


def draw_all(step, k, allowed):
    return global_top_k({p: scores(step, p) for p in allowed}, k, allowed)


def candidates(step, path, run):
    uniforms = np.random.default_rng([step, ord(path)]).random((12, 2))
    n_in, n_out = SHAPES[path]
    f, g = gse.grabo(normal(step)[path], normal(step)[path].T)
    assert (len(f), len(g)) == (n_in, n_out)
    return gse.sample_pairs(f, g, uniforms)


def gse_of(scope):
    def method(*args, **options):
        return gse.gse(
            *args, alpha=0.3, t_end=45, candidates=candidates, scope=scope, **options
        )

    return method


def deep_r_of(**draws):
    def method(params, forward, inner, grad, due):
        signs = {path: np.where(v < 0, -1.0, 1.0) for path, v in PARAMS.items()}
        return adaptive.deep_r_run(
            params,
            forward,
            inner,
            grad,
            signs=signs,
            learning_rate=0.05,
            l1=1e-2,
            temperature=1e-3,
            noise=lambda step, path: normal(500 + step)[path],
            **draws,
        )

    return method


def dsr_of(*args, **options):
    return adaptive.dsr_run(*args, threshold=0.05, target=3, draw=draw, **options)


METHODS = {
    "gse": gse_of("layer"),
    "gse_global": gse_of("global"),
    "snfs": dynamic.snfs_run,
    "rigl_itop": dynamic.rigl_itop_run,
    "mest": lambda *a, **o: mest.mest_run(*a, fraction=0.3, draw=draw, **o),
    "srigl": lambda *a, **o: neurons.srigl_run(*a, gamma=0.0, **o),
    "dsr": dsr_of,
    "deep_r": deep_r_of(draw=draw),
    "deep_r_global": deep_r_of(draw_all=draw_all),
}
MOVES_BETWEEN_LAYERS = {"gse_global", "snfs", "dsr", "deep_r_global"}


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("name", METHODS)
def test_budget_zeros_and_moments(name, inner):
    history = METHODS[name](START, FORWARD, INNERS[inner], grad, due=DUE)
    assert len(history) == 51
    layers = set()
    for snapshot in history:
        assert nnz(snapshot.forward) == 16
        layers.add(int(snapshot.forward["a"].sum()))
        for path, mask in snapshot.forward.items():
            assert not snapshot.theta[path][~mask].any()
            assert (snapshot.alpha[path] == snapshot.theta[path]).all()
            assert not any(m[~mask].any() for m in snapshot.moments[path].values())
    assert (len(layers) > 1) == (name in MOVES_BETWEEN_LAYERS)
    assert dynamic.explored(history)[-1][0] > 16
    for before, after in pairwise(history):
        for path, mask in after.forward.items():
            new = mask & ~before.forward[path]
            assert not after.theta[path][new].any()
            assert not any(m[new].any() for m in after.moments[path].values())


def test_trajectories_differ():
    ends = {
        name: np.concatenate(
            [
                v.ravel()
                for v in method(START, FORWARD, INNERS["sgd"], grad, due=DUE)[
                    -1
                ].theta.values()
            ]
        )
        for name, method in METHODS.items()
    }
    names = list(ends)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not np.array_equal(ends[one], ends[other]), (one, other)


def test_gse_stands_still_after_t_end():
    history = METHODS["gse"](START, FORWARD, INNERS["sgd"], grad, due=every(1))
    moved = [
        any((a.forward[p] != b.forward[p]).any() for p in SHAPES)
        for a, b in pairwise(history)
    ]
    assert all(moved[:30]) and not any(moved[45:])


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("method", ["rigl", "static"])
def test_the_loop_agrees_with_the_other_oracle(method, inner):
    def fraction(step):
        return 0.5 if step < 30 else 0.3

    other = Oracle(
        START,
        method,
        INNERS[inner],
        forward={path: int(mask.sum()) for path, mask in FORWARD.items()},
        due=DUE,
        drop_fraction=fraction,
        initial=lambda path, k: FORWARD[path],
        order=lambda step, path: np.arange(PARAMS[path].size).reshape(SHAPES[path]),
    )
    if method == "rigl":
        run = dynamic.rigl_itop_run
        options = {"due": DUE, "drop_fraction": fraction}
    else:
        run, options = pruning.fixed, {}
    history = run(START, FORWARD, INNERS[inner], grad, **options)
    for step in range(51):
        for path, leaf in other.leaves.items():
            assert (history[step].theta[path] == leaf.theta).all()
            assert (history[step].forward[path] == leaf.forward).all()
            for slot, value in leaf.moments.items():
                assert (history[step].moments[path][slot] == value).all()
        other.step(grad(other.alpha(), step))


def test_mest_soft_bound_returns_to_the_target():
    def rate(step):
        return mest.elastic(step, (0.5, 0.25, 0.0), (20, 40))

    history = mest.mest_run(
        START,
        FORWARD,
        INNERS["sgd"],
        grad,
        due=DUE,
        fraction=rate,
        draw=draw,
        soft=True,
    )
    # 4 of 8 more per layer, then 2, then none.
    totals = [nnz(s.forward) for s in history]
    assert totals == [16] * 5 + [24] * 15 + [20] * 20 + [16] * 11


def test_srigl_keeps_a_constant_fan_in_under_ablation():
    history = neurons.srigl_run(
        START, FORWARD, INNERS["sgd"], grad, due=DUE, gamma=1.0, permanent=True
    )
    living = []
    for snapshot in history:
        fans = [neurons.fan_in(mask) for mask in snapshot.forward.values()]
        assert all(len(set(fan[fan > 0].tolist())) == 1 for fan in fans)
        assert nnz(snapshot.forward) <= 16
        living.append(sum(int((fan > 0).sum()) for fan in fans))
    assert living == sorted(living, reverse=True)
    assert living[-1] < living[0] == 12


def test_dsr_lists_its_thresholds():
    memory = {}
    adaptive.dsr_run(
        START,
        FORWARD,
        INNERS["sgd"],
        grad,
        due=DUE,
        threshold=1e-3,
        target=3,
        draw=draw,
        memory=memory,
    )
    ratios = np.diff(np.log2(memory["H"]))
    assert len(ratios) == 10  # Steps 5, 10, ..., 50.
    assert set(np.round(ratios, 9)) <= {-1.0, 0.0, 1.0}
    assert ratios[0] == 1.0


def test_granet_counts_follow_the_cubic_with_regrowth():
    history = pruning.granet_run(
        PARAMS,
        {path: np.ones(shape, bool) for path, shape in SHAPES.items()},
        INNERS["sgd"],
        grad,
        due=DUE,
        sparsity=lambda step: pruning.cubic(step, 0, 20, 0.75),
    )
    # 56 entries; .75 (1 - (1 - t/20)^3) = .4336, .65625, .73828, .75 at 5, 10, 15, 20.
    counts = [nnz(s.forward) for s in history[::5]]
    assert counts == [56, 32, 19, 15, 14, 14, 14, 14, 14, 14, 14]
    assert any((history[45].forward[p] != history[50].forward[p]).any() for p in SHAPES)
