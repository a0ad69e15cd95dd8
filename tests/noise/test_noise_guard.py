"""The noise guard: who is suspected, when, and that nothing else is touched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from learnit_r8 import R8Scheduler
from learnit_r8.checkpoint import state_codec
from learnit_r8.core.arrays import in_any
from learnit_r8.events import StrategyDecided, SuspectsNamed
from learnit_r8.noise.cut import Classes, LossesSince, agreement, even_loss, half_way
from learnit_r8.noise.guard import NoiseGuard
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.strategies import names

N, EPOCHS = 240, 15
CHANCE = 2.3


class Learner:
    """Losses as a network's: right samples are learned; wrong ones contradict it more the more it knows.

    A rare sample is learned in proportion to how often its kin were trained on; a wrong one is
    learned by heart, slowly, by being trained on.
    """

    def __init__(self, kinds, seed=0):
        self.kinds = np.asarray(kinds)
        self.seen = np.zeros(len(self.kinds))
        self.rng = np.random.default_rng(seed)
        self.steps = 0

    def train(self, indices):
        self.steps += 1
        knows = 1 - np.exp(-self.seen[self.kinds == "right"].mean() / 2)
        rare = self.seen[self.kinds == "rare"].mean() if (self.kinds == "rare").any() else 0
        loss = {
            "right": CHANCE * (1 - knows) + 0.05,
            "rare": CHANCE * (1 + knows) * np.exp(-rare / 4),
            "wrong": CHANCE * (1 + knows),
        }
        base = np.array([loss[kind] for kind in self.kinds[indices]])
        base *= np.where(self.kinds[indices] == "wrong", np.exp(-self.seen[indices] / 40), 1)
        self.seen[indices] += 1
        return (base * np.exp(0.2 * self.rng.standard_normal(len(indices)))).astype(np.float32)


class Heard:
    """A sink that keeps what the guard says."""

    def __init__(self):
        self.events = []

    def record(self, event):
        if isinstance(event, (SuspectsNamed, StrategyDecided)):
            self.events.append(event)


def kinds_of(wrong=0, rare=0, n=N):
    kinds = np.array(["right"] * n, dtype=object)
    order = np.random.default_rng(1).permutation(n)
    kinds[order[:wrong]] = "wrong"
    kinds[order[wrong : wrong + rare]] = "rare"
    return kinds


def train(kinds, scalar=False, **arguments):
    """Run a learner to its end; return the scheduler, what was heard, and each epoch's draws."""
    arguments = {"num_epochs": EPOCHS, "noise_guard": "cap", "strategy": "uniform"} | arguments
    learner, heard, drawn = Learner(kinds), Heard(), []
    run = R8Scheduler(len(kinds), 16, **arguments, checkpoint_dir=None, ui="off", sinks=[heard])
    for _ in run.epoch_iterator():
        drawn.append([])
        for batch in run.batch_iterator():
            losses = learner.train(batch.indices)
            run.update_with_loss(float(losses.mean()) if scalar else losses)
            drawn[-1].append(batch.indices)
    return run, heard, [np.concatenate(batches) for batches in drawn]


def test_wrong_samples_are_flagged_named_and_kept_out_of_the_second_half():
    kinds = kinds_of(wrong=48)
    run, heard, drawn = train(kinds)
    wrong = kinds == "wrong"
    assert np.array_equal(run.noise_guard.flagged, wrong)
    named = [event for event in heard.events if isinstance(event, SuspectsNamed)]
    assert named[-1].count == 48
    assert set(named[-1].indices) == set(np.flatnonzero(wrong))
    assert list(named[-1].losses) == sorted(named[-1].losses, reverse=True)
    decisions = [event.decision for event in heard.events if isinstance(event, StrategyDecided)]
    assert decisions == ["noise trial", "noise guard open"]
    for epoch in drawn[8:]:
        assert not wrong[epoch].any()
        assert np.array_equal(np.sort(epoch), np.flatnonzero(~wrong))


@pytest.mark.parametrize(("mode", "epochs", "first"), [("report", 15, 3), ("cap", 15, 5), ("cap", 60, 6)])
def test_nobody_is_suspected_before_a_share_of_the_budget_and_five_epochs(mode, epochs, first):
    run, heard, drawn = train(kinds_of(wrong=48), noise_guard=mode, num_epochs=epochs)
    assert heard.events
    assert heard.events[0].step >= first * run.steps_per_epoch
    assert all(len(epoch) == N for epoch in drawn[:first])


def test_report_names_suspects_and_changes_nothing():
    kinds = kinds_of(wrong=48)
    run, heard, drawn = train(kinds, noise_guard="report")
    assert run.noise_guard.flagged[kinds == "wrong"].mean() > 0.9
    assert any(isinstance(event, SuspectsNamed) for event in heard.events)
    _, nothing, silent = train(kinds, noise_guard="off")
    assert not nothing.events
    assert all(np.array_equal(a, b) for a, b in zip(drawn, silent, strict=True))


def test_clean_data_is_left_alone():
    run, heard, drawn = train(kinds_of())
    assert not run.noise_guard.flagged.any()
    assert not heard.events
    assert all(len(epoch) == N for epoch in drawn)


def test_the_trial_acquits_samples_that_their_kin_teach():
    kinds = kinds_of(rare=40)
    run, heard, drawn = train(kinds, num_epochs=25)
    assert not run.noise_guard.flagged.any()
    decisions = [event.decision for event in heard.events if isinstance(event, StrategyDecided)]
    assert decisions in ([], ["noise trial", "noise guard shut"])
    assert all(len(epoch) == N for epoch in drawn[9:])


def test_with_groups_a_hard_class_is_not_suspected_and_a_small_one_not_judged():
    kinds = kinds_of(wrong=24, rare=40)
    groups = np.arange(N) % 3
    groups[kinds == "rare"] = 3
    groups[np.flatnonzero(kinds == "wrong")[:5]] = 4  # a class of five
    run, _, _ = train(kinds, groups=groups)
    flagged = run.noise_guard.flagged
    assert flagged[kinds == "rare"].mean() < 0.1
    assert not flagged[groups == 4].any()
    assert flagged[(kinds == "wrong") & (groups < 3)].all()


def test_with_one_loss_a_batch_suspects_are_left_out_from_the_middle_on():
    kinds = kinds_of(wrong=48)
    _, heard, drawn = train(kinds, scalar=True, num_epochs=40)
    wrong = kinds == "wrong"
    assert all(len(epoch) == N for epoch in drawn[:20])
    assert heard.events
    assert np.mean([wrong[epoch].mean() for epoch in drawn[30:]]) < 0.1


@pytest.mark.parametrize("strategy", names())
def test_every_strategy_draws_wrong_samples_at_most_half_as_often_as_uniform(strategy):
    kinds = kinds_of(wrong=48)
    run, _, drawn = train(kinds, strategy=strategy, num_epochs=30)
    share = (kinds[np.concatenate(drawn)] == "wrong").mean()
    assert share <= 0.1
    assert run.noise_guard.flagged.sum() == pytest.approx(48, abs=6)


def test_suspects_take_turns_while_they_are_drawn_at_a_tenth_of_the_rate():
    guard, catalog = NoiseGuard("cap", 1000), LossCatalog(1000)
    everyone = np.arange(1000)
    wrong = everyone < 200
    masks = []
    for epoch in range(60):
        mask = guard.start_epoch(catalog, epoch / 60, np.random.default_rng(epoch))
        drawn = everyone if mask is None else everyone[~mask]
        losses = np.where(wrong[drawn], 5.0, 2.3 if epoch == 0 else 0.3).astype(np.float32)
        catalog.record(catalog.look_up(drawn), losses, epoch)
        guard.end_epoch(catalog, (epoch + 1) / 60)
        masks.append(np.zeros(1000, bool) if mask is None else mask)
    first = next(e for e, mask in enumerate(masks) if mask.any())
    assert first == 6  # after a tenth of the budget
    guarded = np.array(masks)[first + 3 : 30]  # behind trial and gate, before the middle
    assert not guarded[:, ~wrong].any()
    drawn = (~guarded[:10, wrong]).sum(0)
    assert drawn.min() == drawn.max() == 1
    assert np.array(masks)[30:, wrong].all()


def test_suspects_are_not_believed_where_the_others_are_learned_too_well_for_so_many_wrong_labels():
    """With a fifth of the labels wrong, right ones keep a loss of -ln(.8) = .22: a region is not learned yet."""
    for others, believed in ((0.3, True), (0.05, False)):
        guard, catalog = NoiseGuard("report", 1000), LossCatalog(1000)
        ids = np.arange(1000)
        for epoch in range(30):
            losses = np.where(ids < 200, 5.0, 2.3 if epoch == 0 else others).astype(np.float32)
            catalog.record(catalog.look_up(ids), losses, epoch)
            guard.end_epoch(catalog, (epoch + 1) / 30)
        assert guard.flagged.sum() == (200 if believed else 0)


@given(st.integers(1, 49), st.floats(0.5, 2.0), st.integers(0, 60))
def test_suspects_agree_with_others_that_keep_the_loss_so_many_wrong_labels_imply(wrong, factor, named):
    """A share s of wrong labels keeps the others at -ln(1 - s); more suspects than losses above the cut count."""
    share = wrong / 100
    others = -np.log1p(-share) * factor
    losses = np.where(np.arange(100) < wrong, 5.0, others).astype(np.float32)
    expected = -np.expm1(-others) / max(share, named / 100)
    assert agreement(losses, named, 1.5, 2.3) == pytest.approx(expected, rel=1e-5)


def test_a_trial_that_acquits_is_followed_by_another_and_by_no_fourth():
    guard, catalog = NoiseGuard("cap", 1000), LossCatalog(1000)
    ids = np.arange(1000)
    away, decisions = np.zeros(1000, bool), []
    for epoch in range(60):
        mask = guard.start_epoch(catalog, epoch / 60, np.random.default_rng(epoch))
        drawn = ids if mask is None else ids[~mask]
        high = np.where(away[drawn], 0.5, 3.0)  # left out, suspects turn out to be taught by the others
        losses = np.where(drawn < 200, high, 2.3 if epoch == 0 else 0.3).astype(np.float32)
        catalog.record(catalog.look_up(drawn), losses, epoch)
        report = guard.end_epoch(catalog, (epoch + 1) / 60)
        away = np.zeros(1000, bool) if mask is None else mask
        if report is not None:
            decisions.append(report.decision)
    assert decisions == ["noise trial", "noise guard shut"] * 3
    assert not guard.flagged.any()


@pytest.mark.parametrize(
    ("others", "groups", "again"),
    [(0.3, None, False), (0.17, None, True), (0.5, None, True), (0.17, np.arange(1000) % 10, False)],
)
@pytest.mark.parametrize("stays", [True, False])
def test_thin_evidence_has_to_be_confirmed_by_a_second_trial(others, groups, again, stays):
    """Thin: the others keep less than a fifth of wrong labels implies, or so much that they are not learned."""
    guard, catalog = NoiseGuard("cap", 1000, groups), LossCatalog(1000)
    ids = np.arange(1000)
    absences, decisions, begun = np.zeros(1000, int), [], 60
    for epoch in range(60):
        mask = guard.start_epoch(catalog, epoch / 60, np.random.default_rng(epoch))
        drawn = ids if mask is None else ids[~mask]
        taught = not stays and epoch > begun + 2  # what the first trial left out was learned in the meantime
        losses = np.where(drawn < 200, 0.5 if taught else 5.0, 2.3 if epoch == 0 else others).astype(np.float32)
        catalog.record(catalog.look_up(drawn), losses, epoch)
        report = guard.end_epoch(catalog, (epoch + 1) / 60)
        state, guard = guard.state_dict(), NoiseGuard("cap", 1000, groups)  # resumed between all epochs
        guard.load_state_dict(state)
        absences += False if mask is None else mask
        if report is not None and report.decision:
            decisions.append(report.decision)
            assert ("groups=" in report.reason) == (report.decision == "noise guard open" and groups is None)
            begun = epoch if len(decisions) == 1 else begun
    first = ["noise trial", *["noise trial again"] * again]
    opened = stays or not again
    assert decisions[: len(first) + 1] == [*first, "noise guard open" if opened else "noise guard shut"]
    assert absences[:200].min() >= (40 if stays else 1)
    assert not absences[200:].any()


@pytest.mark.parametrize("cut", [5, 50, 61, 77, 90, 110, 140, 200])
@pytest.mark.parametrize("strategy", ["uniform", "prioritized"])
def test_a_resumed_run_leaves_out_the_same_samples(cut, strategy):
    kinds = kinds_of(wrong=48)
    arguments = {"num_epochs": EPOCHS, "noise_guard": "cap", "strategy": strategy, "checkpoint_dir": None, "ui": "off"}

    def steps(run, learner, stop=10**9):
        drawn = []
        for _ in run.epoch_iterator():
            for batch in run.batch_iterator():
                run.update_with_loss(learner.train(batch.indices))
                drawn.append(batch.indices.tolist())
                if run.global_step == stop:
                    return drawn
        return drawn

    whole = steps(R8Scheduler(N, 16, **arguments), Learner(kinds))
    learner = Learner(kinds)
    run = R8Scheduler(N, 16, **arguments)
    head = steps(run, learner, cut)
    text, segments = state_codec.encode(run.state_dict())
    state = state_codec.decode(text, np.frombuffer(bytearray(b"".join(part.tobytes() for part in segments)), np.uint8))
    resumed = R8Scheduler(N, 16, **arguments)
    resumed.load_state_dict(state)
    assert head + steps(resumed, learner) == whole
    assert resumed.noise_guard.state_dict()["stage"] == "open"


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=80),
    st.floats(0.01, 10),
    st.floats(1, 3),
)
def test_the_cut_stays_in_its_range_and_does_not_depend_on_order(losses, low, factor):
    values = np.array(losses, np.float32)
    cut = half_way(values, low, low * factor)
    assert low <= cut <= low * factor
    assert half_way(values[::-1].copy(), low, low * factor) == cut


def test_the_cut_agrees_with_a_gaussian_mixture_where_the_groups_are_apart():
    rng = np.random.default_rng(0)
    for share in (0.1, 0.2, 0.4):
        wrong = rng.random(4000) < share
        losses = np.where(wrong, rng.normal(3.0, 0.4, 4000), rng.normal(0.5, 0.2, 4000)).astype(np.float32)
        found = losses > half_way(losses, 0.6 * CHANCE, CHANCE)
        mixture = GaussianMixture(2, random_state=0).fit(losses[:, None])
        upper = mixture.predict(losses[:, None]) == mixture.means_[:, 0].argmax()
        assert np.mean(found != upper) < 0.005
        assert abs(found.mean() - wrong.mean()) < 0.005


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 12), st.sampled_from(["ones", "nan", "negative", "huge"]))
def test_odd_sizes_and_losses_never_stop_an_epoch(num_samples, batch_size, num_epochs, kind):
    value = {"ones": 1.0, "nan": np.nan, "negative": -3.0, "huge": 1e14}[kind]
    rng = np.random.default_rng(num_samples)
    with R8Scheduler(
        num_samples,
        batch_size,
        num_epochs=num_epochs,
        noise_guard="cap",
        groups=np.arange(num_samples) % 3,
        checkpoint_dir=None,
        ui="off",
    ) as run:
        for _ in run.epoch_iterator():
            for batch in run.batch_iterator():
                losses = np.where(rng.random(len(batch.indices)) < 0.1, value, rng.exponential(1.0))
                run.update_with_loss(losses, skipped=True)
        assert run.global_step >= num_epochs


def test_masks_are_joined():
    a, b = np.array([True, False, False]), np.array([False, False, True])
    assert in_any(None, None) is None
    assert in_any(a, None) is a
    assert in_any(None, b) is b
    assert in_any(a, b).tolist() == [True, False, True]


@settings(deadline=None)
@given(st.integers(2, 12), st.floats(0, 3), st.integers(0, 2**32 - 1))
def test_the_untrained_loss_is_ln_k_however_large_the_outputs_are(classes, scale, seed):
    """An untrained model's outputs say nothing of the label, so it gives the right one 1/K on average."""
    rng = np.random.default_rng(seed)
    outputs = scale * rng.standard_normal((20_000, classes))
    losses = np.log(np.exp(outputs).sum(1)) - outputs[np.arange(20_000), rng.integers(0, classes, 20_000)]
    assert even_loss(losses.astype(np.float32)) == pytest.approx(max(np.log(classes), losses.mean() / 2), rel=0.06)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_the_untrained_loss_lies_between_half_of_the_mean_and_the_mean(losses):
    values = np.array(losses, np.float32)
    mean = values.mean(dtype=np.float64)
    slack = 1e-6 * (1 + abs(mean))
    assert min(mean, mean / 2) - slack <= even_loss(values) <= max(mean, mean / 2) + slack


@given(st.data())
def test_losses_since_a_moment_are_those_reported_after_it(data):
    """Against lists: the mean of what came since, and of that with the mean before as one more."""
    n = data.draw(st.integers(1, 12))
    rounds = data.draw(st.lists(st.lists(st.integers(0, n - 1), min_size=1, unique=True), min_size=1, max_size=12))
    moment = data.draw(st.integers(0, len(rounds)))
    rng = np.random.default_rng(len(rounds))
    catalog, before, after = LossCatalog(n), [[] for _ in range(n)], [[] for _ in range(n)]
    since = LossesSince(catalog.mean_loss, catalog.uses)
    for number, ids in enumerate(rounds):
        if number == moment:
            since = LossesSince(np.empty(0, np.float32), np.empty(0, np.uint32))
            since.load_state_dict(LossesSince(catalog.mean_loss, catalog.uses).state_dict())
        losses = rng.exponential(1.0, len(ids)).astype(np.float32)
        catalog.record(catalog.look_up(np.array(ids)), losses, number)
        for index, loss in zip(ids, losses, strict=True):
            (before if number < moment else after)[index].append(float(loss))
    if moment == len(rounds):
        since = LossesSince(catalog.mean_loss, catalog.uses)
    expected = [(np.mean(b or [0.0]) + np.sum(a)) / (1 + len(a)) for b, a in zip(before, after, strict=True)]
    assert since.scores(catalog) == pytest.approx(np.array(expected), rel=1e-4, abs=1e-5)
    means = [np.mean(a) for a in after if a]
    assert since.means(catalog, np.ones(n, bool)) == pytest.approx(np.array(means), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("value", [-2.0, 0.0])
@pytest.mark.parametrize("mode", ["report", "cap"])
def test_losses_that_cannot_be_judged_are_told_once_to_who_wants_suspects_kept_out(value, mode):
    guard, catalog = NoiseGuard(mode, 100), LossCatalog(100)
    ids, reports = np.arange(100), []
    for epoch in range(20):
        catalog.record(catalog.look_up(ids), np.full(100, value, np.float32), epoch)
        reports.append(guard.end_epoch(catalog, (epoch + 1) / 20))
        state, guard = guard.state_dict(), NoiseGuard(mode, 100)
        guard.load_state_dict(state)
        assert guard.start_epoch(catalog, (epoch + 1) / 20, np.random.default_rng(0)) is None
    told = [report for report in reports if report is not None]
    assert [report.decision for report in told] == (["noise guard shut"] if mode == "cap" else [])
    assert all("not above 0" in report.reason and report.count == 0 for report in told)


def test_a_rollback_that_takes_uses_back_leaves_no_negative_counts():
    catalog = LossCatalog(3)
    ids = np.arange(3)
    catalog.record(catalog.look_up(ids), np.float32([1, 2, 3]), 0)
    later = LossesSince(np.float32([2, 2, 2]), np.uint32([4, 4, 4]))
    assert later.scores(catalog).tolist() == [2, 2, 2]
    assert len(later.means(catalog, np.ones(3, bool))) == 0


def test_a_class_whose_labels_are_mostly_wrong_has_the_level_of_its_right_ones():
    groups = np.repeat([0, 1, 2], [200, 200, 100])
    losses = np.full(500, 0.1, np.float32)
    losses[440:] = 3.0
    classes = Classes(groups)
    np.testing.assert_allclose(classes.excess(losses)[400:], 2.9, rtol=1e-6)
    assert not classes.excess(losses, 0.15).any()
