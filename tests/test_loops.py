"""Training loops that people have: which rows belong to a step, and what ends it.

Every loop keeps the features that a gradient reached; the head's F̂ must be of these.
"""

import copy
import gc
import threading
import warnings

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from directpred.torch import DirectPredHead  # noqa: E402

DIM, RHO = 4, 0.3


class Loop:
    """An encoder, a head that is attached to nothing, and the features of every step."""

    def __init__(self, make=lambda parameters: torch.optim.SGD(parameters, lr=0.1), **options):
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, DIM))
        self.head = DirectPredHead(DIM, rho=RHO, **options)
        self.optimizer = make([*self.encoder.parameters(), *self.head.parameters()])
        self.steps, self.waiting = [], []

    def forward(self, rows=16, scale=1.0, counts=True):
        z = self.encoder(scale * torch.randn(rows, 8))
        if counts:
            self.waiting.append(z.detach().numpy())
        return self.head(z).square().mean()

    def closed(self):
        """The loop has taken a step."""
        self.steps.append(self.waiting)
        self.waiting = []

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.closed()

    def check_after_waiting(self, steps):
        """The first three steps were closed as one, since the head was told to wait for another."""
        assert len(self.steps) == steps
        self.steps[:3] = [[z for step in self.steps[:3] for z in step]]
        self.check()

    def check(self, steps=None):
        head, steps = self.head, len(self.steps) if steps is None else steps
        assert (int(head.step_count), int(head.closings)) == (steps, steps)
        exact = oracle.correlation(self.steps, RHO)
        np.testing.assert_allclose(head.correlation, exact, atol=1e-5 * np.abs(exact).max())


@pytest.fixture(autouse=True)
def in_silence():
    """A loop that is right says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(params=["found", "attached", "by hand"])
def loop(request):
    """A loop, whichever way its steps are closed."""
    made = Loop()
    if request.param == "attached":
        made.head.attach(made.optimizer)
    if request.param == "by hand":
        step = made.step
        made.step = lambda: (step(), made.head.step())
    return made


# ---- Rows count when a gradient has reached them.


@pytest.mark.parametrize("scale", [float("nan"), 100.0])
def test_a_batch_left_out_does_not_enter(loop, scale):
    for step in range(6):
        loss = loop.forward(scale=scale if step in (0, 3) else 1.0, counts=step not in (0, 3))
        if step in (0, 3):
            continue
        loss.backward()
        loop.step()
    loop.check()
    assert int(loop.head.skipped) == 0


def test_passes_for_validation_logging_or_shapes_do_not_enter(loop):
    loop.forward(2, counts=False)  # a mock forward, as in a constructor
    for _ in range(4):
        loss = loop.forward()
        with torch.no_grad():
            loop.forward(64, scale=100.0, counts=False)
        loop.forward(64, scale=100.0, counts=False)
        loss.backward()
        loop.forward(3, counts=False)
        loop.step()
        loop.forward(3, counts=False)
    loop.check()


def test_an_exception_between_forward_and_backward(loop):
    for step in range(5):
        try:
            loss = loop.forward(counts=step != 2)
            if step == 2:
                raise KeyError
            loss.backward()
        except KeyError:
            loop.optimizer.zero_grad()
            continue
        loop.step()
    loop.check()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_rows_that_are_not_finite_cost_their_forward_alone(loop, bad):
    for step in range(4):
        for micro in range(3):
            spoilt = step in (0, 2) and micro == bad
            loss = loop.forward(scale=float("inf") if spoilt else 1.0, counts=not spoilt)
            (loss if not spoilt else loss.nan_to_num(0, 0, 0)).backward()
            for p in loop.encoder.parameters():
                p.grad.nan_to_num_(0, 0, 0)
        loop.step()
    loop.check()
    assert int(loop.head.skipped) == 0


def test_a_step_of_nothing_but_rows_that_are_not_finite_is_skipped_and_counted(loop):
    for step in range(4):
        for _ in range(2):
            spoilt = step == 2
            loop.forward(scale=float("nan") if spoilt else 1.0, counts=not spoilt).backward()
            if spoilt:
                loop.optimizer.zero_grad()
        loop.step()
    loop.steps.pop(2)
    head = loop.head
    assert (int(head.step_count), int(head.skipped), int(head.closings)) == (3, 1, 4)
    exact = oracle.correlation(loop.steps, RHO)
    np.testing.assert_allclose(head.correlation, exact, atol=1e-5)


def test_one_forward_with_several_backward_passes_counts_once(loop):
    for _ in range(3):
        loss = loop.forward()
        (gradient,) = torch.autograd.grad(loss, loop.encoder[0].weight, retain_graph=True)
        assert gradient.any()
        loss.backward(retain_graph=True)
        loss.backward()
        loop.step()
    loop.check()


def test_a_gradient_penalty_counts_once(loop):
    for _ in range(3):
        x = torch.randn(16, 8, requires_grad=True)
        z = loop.encoder(x)
        loop.waiting.append(z.detach().numpy())
        loss = loop.head(z).square().mean()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.square().sum()).backward()
        loop.step()
    loop.check()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("micro", [1, 3])
def test_activation_checkpointing(loop, reentrant, micro):
    for _ in range(4):
        for _ in range(micro):
            x = torch.randn(16, 8, requires_grad=True)
            loop.waiting.append(loop.encoder(x).detach().numpy())
            out = checkpoint(lambda x: loop.head(loop.encoder(x)), x, use_reentrant=reentrant)
            out.square().mean().backward()
        loop.step()
    loop.check()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_in_front_of_the_head(loop, reentrant):
    for _ in range(4):
        for _ in range(3):
            x = torch.randn(16, 8, requires_grad=True)
            z = checkpoint(loop.encoder, x, use_reentrant=reentrant)
            loop.waiting.append(z.detach().numpy())
            loop.head(z).square().mean().backward()
        loop.step()
    loop.check()


def test_a_frozen_head_that_is_applied_again_later(loop):
    """Two backward passes with a forward in between, the first graph used twice."""
    for _ in range(3):
        first = loop.forward()
        first.backward(retain_graph=True)
        second = loop.forward()
        (first + second).backward()
        loop.step()
    loop.check()


# ---- A step is never cut by guessing.


def test_micro_batches(loop):
    for _ in range(5):
        for rows in (5, 9, 2, 16):
            loop.forward(rows).backward()
        loop.step()
    loop.check()


def test_two_backward_passes_a_step(loop):
    for _ in range(4):
        one, two = loop.forward(), loop.forward()
        one.backward()
        two.backward()
        loop.step()
    loop.check()


@pytest.mark.parametrize("attached", [False, True])
def test_gradients_that_move_elsewhere_between_micro_batches(attached):
    loop = Loop()
    if attached:
        loop.head.attach(loop.optimizer)
    parameters = [*loop.encoder.parameters()]
    for _ in range(4):
        sums = [torch.zeros_like(p) for p in parameters]
        for _ in range(3):
            for total, g in zip(sums, torch.autograd.grad(loop.forward(), parameters), strict=True):
                total += g
        for p, g in zip(parameters, sums, strict=True):
            p.grad = g
        loop.step()
    loop.check()


@pytest.mark.parametrize("attached", [False, True])
def test_master_weights_in_float32(attached):
    """As apex O2 and Megatron keep them: the optimizer never sees the model's parameters."""
    torch.manual_seed(0)
    encoder, head = nn.Linear(8, DIM).bfloat16(), DirectPredHead(DIM, rho=RHO)
    masters = [p.detach().float().requires_grad_() for p in encoder.parameters()]
    optimizer, steps = torch.optim.SGD(masters, lr=0.1), []
    if attached:
        head.attach(optimizer)
    for _ in range(5):
        steps.append([])
        for micro in range(4):
            z = encoder(torch.randn(32, 8).bfloat16() * (1 + micro))
            steps[-1].append(z.detach().float().numpy())
            head(z).square().mean().backward()
            for p in encoder.parameters() if micro < 3 else ():
                p.kept, p.grad = p.grad, None  # nothing is left to tell a step by
        for master, p in zip(masters, encoder.parameters(), strict=True):
            master.grad = p.grad.float()
            p.grad = None
        optimizer.step()
        for master, p in zip(masters, encoder.parameters(), strict=True):
            p.data.copy_(master)
    assert int(head.step_count) == 5
    exact = oracle.correlation(steps, RHO)
    np.testing.assert_allclose(head.correlation, exact, atol=1e-5 * np.abs(exact).max())


def test_the_rows_of_a_step_that_a_scaler_leaves_out_join_the_next(loop):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(8):
        overflows = step in (0, 3, 4)
        loss = loop.forward() * (float("inf") if overflows else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(loop.optimizer)
        if overflows and "step" in vars(loop):
            pass  # by hand: the loop calls step() after every one; none was taken
        before = int(loop.head.closings)
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        if overflows:
            assert int(loop.head.closings) == before
            continue
        loop.closed()
        if "step" in vars(loop):
            loop.head.step()
    loop.check()


def test_rows_are_dropped_where_the_loop_says_so(loop):
    for step in range(5):
        loop.forward(counts=step != 2).backward()
        if step == 2:
            loop.head.discard()
            loop.optimizer.zero_grad()
            continue
        loop.step()
    loop.check()


# ---- The head finds its optimizer.


class TwoSteps(torch.optim.Optimizer):
    """As SAM, GSAM and WSAM: the loop calls two methods, and never `step`."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    def second_step(self):
        self.base.step()
        self.zero_grad()

    def step(self, closure=None):
        raise NotImplementedError


class Apart:
    """An optimizer whose base is kept elsewhere, where nothing can look for it."""

    def __init__(self, outer):
        self.outer, self.base = outer, outer.base
        del outer.base

    def second_step(self):
        self.base.step()
        self.outer.zero_grad()


class Outer:
    """A wrapper that is no optimizer, as of LARC or accelerate."""

    def __init__(self, parameters):
        self.optim = torch.optim.SGD(parameters, lr=0.1)
        self.zero_grad = self.optim.zero_grad

    def step(self):
        self.optim.step()


def test_two_passes_a_step_as_sam_takes_them():
    loop = Loop(TwoSteps)
    for _ in range(50):
        loop.forward().backward()
        loop.optimizer.zero_grad()
        loop.forward().backward()
        loop.optimizer.second_step()
        loop.closed()
    loop.check()


def test_an_optimizer_in_a_wrapper():
    loop = Loop(Outer)
    for _ in range(5):
        loop.forward().backward()
        loop.forward().backward()
        loop.step()
    loop.check()


def test_lookahead_of_timm():
    timm = pytest.importorskip("timm.optim")
    loop = Loop(lambda p: timm.Lookahead(torch.optim.SGD(p, lr=0.1), k=2))
    for _ in range(5):
        loop.forward().backward()
        loop.forward().backward()
        loop.step()
    loop.check()


def test_a_closure_that_is_called_many_times():
    loop = Loop(lambda p: torch.optim.LBFGS(p, max_iter=4))

    def closure():
        loop.optimizer.zero_grad()
        loss = loop.forward()
        loss.backward()
        return loss

    for _ in range(4):
        loop.optimizer.step(closure)
        loop.closed()
    loop.check()


@pytest.mark.parametrize("order", ["probe first", "probe last"])
@pytest.mark.parametrize("micro", [1, 3])
def test_an_online_probe_with_an_optimizer_of_its_own(order, micro):
    loop = Loop()
    probe = nn.Linear(DIM, 2)
    other = torch.optim.SGD(probe.parameters(), lr=0.1)
    for _ in range(4):
        for part in range(micro):
            z = loop.encoder(torch.randn(16, 8))
            loop.waiting.append(z.detach().numpy())
            loss = loop.head(z).square().mean()
            probe(z.detach()).square().mean().backward()
            if order == "probe first":
                other.step()
            loss.backward()
            if part == micro - 1:
                loop.step()
            if order == "probe last":
                other.step()
            other.zero_grad()
    loop.check()


def test_the_encoder_split_over_two_optimizers():
    loop = Loop(lambda p: torch.optim.SGD(p[:2], lr=0.1))
    second = torch.optim.SGD([*loop.encoder.parameters()][2:], lr=0.1)
    for _ in range(5):
        for _ in range(2):
            loop.forward().backward()
        loop.step()
        second.step()
        second.zero_grad()
    loop.check()


def test_two_models_each_with_its_own_optimizer_and_pace():
    one, two = Loop(), Loop()
    for step in range(12):
        for loop, every in ((one, 2), (two, 3)):
            loop.forward().backward()
            if step % every == every - 1:
                loop.step()
    one.check(6)
    two.check(4)


def test_an_optimizer_made_anew():
    loop = Loop()
    for stage in range(3):
        old = loop.optimizer  # still a name
        loop.optimizer = torch.optim.SGD(loop.encoder.parameters(), lr=0.1 / (1 + stage))
        for _ in range(3):
            loop.forward().backward()
            loop.forward().backward()
            loop.step()
        assert old is not loop.optimizer
    loop.check()


def test_a_copy_of_model_and_optimizer_finds_its_own():
    loop = Loop()
    loop.forward().backward()
    loop.step()
    other = copy.deepcopy(loop)
    other.optimizer = torch.optim.SGD(other.encoder.parameters(), lr=0.1)
    for each in (loop, other):
        for _ in range(3):
            each.forward().backward()
            each.forward().backward()
            each.step()
        each.check()


def test_a_step_by_hand_is_not_closed_twice():
    loop = Loop()
    for _ in range(4):
        loop.forward().backward()
        loop.step()
        loop.head.step()
        loop.head.step()
    loop.check()


def test_a_failed_step_of_the_optimizer_leaves_no_rows_of_its_own_behind():
    """The rows stay, and enter once; a later step with a closure closes those it made, too."""

    class Fails(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    loop = Loop(lambda p: Fails(p, lr=0.1))
    loop.head.attach(loop.optimizer)
    loop.forward().backward()
    loop.optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.optimizer.step()
    loop.optimizer.fails = False

    def closure():
        loss = loop.forward()
        loss.backward()
        return loss

    loop.optimizer.step(closure)
    loop.closed()
    loop.check()


def by_its_own_rule(loop, steps):
    for _ in range(steps):
        loop.forward().backward()
        loop.closed()
        with torch.no_grad():
            for p in loop.encoder.parameters():
                p -= 0.1 * p.grad
                p.grad = None


def test_without_an_optimizer_it_closes_at_the_next_forward_and_says_so_once():
    loop = Loop()
    del loop.optimizer
    gc.collect()
    with pytest.warns(UserWarning, match="no torch.optim.Optimizer holds") as said:
        by_its_own_rule(loop, 5)
    assert len(said) == 1
    loop.steps.pop()  # closed by the forward to come
    loop.check()


def test_a_resumed_loop_without_an_optimizer_loses_no_step():
    loop = Loop()
    del loop.optimizer
    gc.collect()
    warnings.simplefilter("ignore")
    by_its_own_rule(loop, 3)
    saved = loop.head.state_dict()
    loop.head = DirectPredHead(DIM, rho=RHO)
    loop.head.load_state_dict(saved)
    by_its_own_rule(loop, 3)
    loop.steps.pop()
    loop.check()


def test_two_threads_in_one_forward_lose_no_rows():
    loop = Loop()
    loop.head.attach(loop.optimizer)
    for _ in range(5):
        inputs = [torch.randn(16, 8) for _ in range(40)]

        def work(parts):
            for x in parts:
                loop.head(loop.encoder(x)).square().mean().backward()

        threads = [threading.Thread(target=work, args=(inputs[i::2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loop.waiting = [loop.encoder(x).detach().numpy() for x in inputs]
        loop.step()
    loop.check()


def test_heads_that_are_gone_leave_nothing_in_the_optimizer():
    loop = Loop()
    for _ in range(50):
        DirectPredHead(DIM).attach(loop.optimizer)
    gc.collect()
    from directpred.torch.closing import attached

    assert len(attached[loop.optimizer].heads) == 0


# ---- Silence is ended.


def said(loop, step, steps=60):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            step(loop)
    return [str(w.message) for w in caught if "DirectPredHead" in str(w.message)]


def test_attached_to_an_optimizer_whose_step_never_runs():
    loop = Loop(TwoSteps)
    loop.head.attach(loop.optimizer)

    def step(loop):
        loop.forward().backward()
        loop.optimizer.second_step()
        loop.closed()

    assert not said(loop, step)  # it is looked through
    loop.check(60)

    loop = Loop(lambda p: Apart(TwoSteps(p)))
    loop.head.attach(loop.optimizer.outer)
    (message,) = said(loop, step)
    assert "(TwoSteps) whose step() has not run, while another (SGD)" in message
    loop.check_after_waiting(60)


def test_attached_to_an_optimizer_that_was_made_anew():
    loop = Loop()
    loop.head.attach(loop.optimizer)
    new = torch.optim.Adam(loop.encoder.parameters())

    def step(loop):
        loop.forward().backward()
        new.step()
        loop.closed()

    (message,) = said(loop, step, 5)
    assert "it closes its steps after that one" in message
    loop.check_after_waiting(5)
    loop.head.attach(new)  # what it says
    assert not said(loop, step, 5)
    loop.check()


def test_attached_to_an_optimizer_that_was_made_anew_for_a_part_of_the_model():
    loop = Loop()
    loop.head.attach(loop.optimizer)
    new = torch.optim.Adam(loop.encoder[2].parameters())

    def step(loop):
        loop.forward().backward()
        new.step()

    (message,) = said(loop, step, 5)
    assert "(SGD) whose step() has not run" in message
    assert "another (Adam) has stepped the parameters in front of it 3 times" in message
    loop.head.attach(new)  # the line that cures it
    loop.head.discard()
    step(loop)
    assert int(loop.head.step_count) == 1


def test_attached_to_an_optimizer_around_another_of_the_same_parameters():
    """The outer one's hooks close the step, once, also where it takes a closure."""

    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            return self.inner.step(closure)

    for closure in (False, True):
        loop = Loop(lambda p: Outer(p, lr=0.1))
        loop.optimizer.inner = torch.optim.SGD(loop.encoder.parameters(), lr=0.1)
        loop.head.attach(loop.optimizer)

        def passes(loop=loop):
            loss = loop.forward()
            loss.backward()
            return loss

        for _ in range(4):
            if not closure:
                passes()
            loop.optimizer.step(passes if closure else None)
            loop.closed()
        loop.check()


def test_attached_to_the_optimizer_of_another_model():
    loop = Loop()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    loop.head.attach(other)

    def step(loop):
        loop.forward().backward()
        loop.optimizer.step()

    (message,) = said(loop, step)
    assert "attached to an optimizer (SGD) whose step() has not run" in message


def test_attached_to_an_optimizer_that_runs_no_hooks():
    loop = Loop()
    loop.head.attach(loop.optimizer)
    (message,) = said(loop, lambda loop: loop.forward().backward())
    assert "has seen 50 backward passes and no step" in message


def test_an_optimizer_that_steps_while_the_head_is_in_evaluation_mode():
    loop = Loop()
    loop.head.attach(loop.optimizer)
    loop.head.eval()

    def step(loop):
        loop.forward().backward()
        loop.optimizer.step()

    (message,) = said(loop, step)
    assert "has gathered nothing in 50 steps of its optimizer" in message
    assert "call model.train()" in message


def test_an_optimizer_that_steps_while_no_gradient_reaches_the_head():
    loop = Loop()
    loop.head.attach(loop.optimizer)

    def step(loop):
        loop.head(loop.encoder(torch.randn(4, 8)).detach())
        loop.optimizer.step()

    (message,) = said(loop, step)
    assert "no gradient reaches what it returns" in message


def test_many_micro_batches_are_no_reason_to_speak():
    loop = Loop()
    loop.forward().backward()
    loop.step()
    for _ in range(2):
        for _ in range(40):
            loop.forward(2).backward()
        loop.step()
    loop.check()


@pytest.mark.parametrize("mode", ["evaluation", "detached"])
def test_a_head_attached_to_nothing_that_never_gathers(mode):
    loop = Loop()
    loop.head.train(mode == "detached")

    def step(loop):
        z = loop.encoder(torch.randn(4, 8))
        loss = loop.head(z if mode == "evaluation" else z.detach()).square().mean() + z.mean()
        loss.backward()
        loop.optimizer.step()

    (message,) = said(loop, step)
    assert "has gathered nothing in 50 forward passes" in message
    assert ("call model.train()" if mode == "evaluation" else "takes no gradient") in message


def test_a_trained_head_and_a_target_are_left_in_peace():
    loop = Loop()
    loop.forward().backward()
    loop.step()
    loop.head.eval()
    target = copy.deepcopy(loop.head).train()
    for _ in range(60):
        loop.head(loop.encoder(torch.randn(4, 8))).square().mean().backward()
        with torch.no_grad():
            target(torch.randn(4, DIM))
    loop.check()


def test_a_loss_that_hands_its_gradient_past_the_predictor():
    from directpred.losses import iso_loss

    loop = Loop()
    for _ in range(4):
        z = loop.encoder(torch.randn(16, 8))
        loop.waiting.append(z.detach().numpy())
        iso_loss(z, loop.head(z), torch.randn(16, DIM)).backward()
        loop.step()
    loop.check()


def test_an_exception_in_the_backward_pass_leaves_nothing_behind(loop):
    for step in range(5):
        loss = loop.forward(scale=100.0 if step == 2 else 1.0, counts=step != 2)
        if step == 2:
            handle = loop.encoder[0].weight.register_hook(lambda g: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
            handle.remove()
            loop.optimizer.zero_grad()
            continue
        loss.backward()
        loop.step()
    loop.check()


@pytest.mark.parametrize("attached", [False, True])
def test_an_optimizer_that_runs_passes_of_its_own_without_a_closure(attached):
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            self.zero_grad()
            self.passes().backward()
            super().step()

    loop = Loop(lambda p: Own(p, lr=0.1))
    loop.optimizer.passes = loop.forward
    if attached:
        loop.head.attach(loop.optimizer)
    for _ in range(4):
        loop.forward().backward()
        loop.step()
    loop.check()


def test_an_optimizer_for_each_parameter_that_steps_within_the_backward_pass():
    loop = Loop()
    for p in loop.encoder.parameters():
        own = torch.optim.SGD([p], lr=0.1)

        def step(p, own=own):
            own.step()
            own.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    for _ in range(5):
        (loop.forward() + loop.forward()).backward()
        loop.closed()
    loop.check()


def test_a_head_shared_by_two_models_in_turns():
    one, two = Loop(), Loop()
    two.head = one.head
    steps = []
    for step in range(8):
        loop = (one, two)[step % 2]
        loop.forward().backward()
        loop.step()
        steps.append(loop.steps[-1])
    one.steps = steps
    one.check()


@pytest.mark.parametrize("kind", ["custom function", "frozen first"])
def test_a_probe_that_steps_often_beside_an_encoder_that_hides_some_of_its_graph(kind):
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    loop, probe = Loop(), nn.Linear(DIM, 2)
    other = torch.optim.SGD(probe.parameters(), lr=0.1)
    if kind == "frozen first":
        with torch.no_grad():
            loop.head(loop.encoder(torch.randn(4, 8)))
        loop.encoder[0].requires_grad_(False)
    for _ in range(4):
        for _ in range(3):
            z = loop.encoder(torch.randn(16, 8))
            z = Same.apply(z) if kind == "custom function" else z
            loop.waiting.append(z.detach().numpy())
            loop.head(z).square().mean().backward()
            with torch.no_grad():
                loop.head(z)
            probe(z.detach()).square().mean().backward()
            other.step()
        loop.step()
    loop.check()


def test_a_copy_made_in_the_middle_of_a_step_waits_for_rows_of_its_own():
    loop = Loop()
    loop.forward().backward()
    loop.step()
    loop.forward().backward()
    snapshot = copy.deepcopy(loop.head).eval()
    before = snapshot.weight.clone()
    loop.step()
    assert torch.equal(snapshot.weight, before)
    loop.check()


def test_closed_by_hand_once_and_never_again():
    loop = Loop()
    loop.head.gather(torch.randn(8, DIM))
    loop.head.step()

    def step(loop):
        loop.forward().backward()
        loop.step()

    (message,) = said(loop, step)
    assert "was closed by head.step() before, but not in the last 10 steps" in message
    assert int(loop.head.step_count) == 1 + 60 - 9
