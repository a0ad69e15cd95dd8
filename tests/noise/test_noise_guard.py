"""The noise guard: who is suspected, when, and that nothing else is touched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8 import R8Scheduler
from learnit_r8.checkpoint import state_codec
from learnit_r8.core.arrays import in_any
from learnit_r8.errors import ProtocolError
from learnit_r8.events import StrategyDecided, SuspectsNamed
from learnit_r8.noise.cut import Classes, LossesSince, evidence, two_groups
from learnit_r8.noise.guard import NoiseGuard
from learnit_r8.noise.votes import Votes
from learnit_r8.samples.catalog import LossCatalog
from learnit_r8.strategies import names

N, EPOCHS = 240, 24
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
        knows = 1 - np.exp(-self.seen[self.kinds == "right"].mean() / 1.2)
        rare = self.seen[self.kinds == "rare"].mean() if (self.kinds == "rare").any() else 0
        loss = {
            "right": CHANCE * (1 - knows) + 0.001 - np.log1p(-np.mean(self.kinds == "wrong")),
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
    assert decisions == ["noise guard open"]
    for epoch in drawn[12:]:
        assert not wrong[epoch].any()
        assert np.array_equal(np.sort(epoch), np.flatnonzero(~wrong))


@pytest.mark.parametrize(("mode", "epochs", "first"), [("report", 30, 8), ("cap", 30, 8), ("cap", 110, 11)])
def test_nobody_is_suspected_before_a_share_of_the_budget_and_eight_epochs(mode, epochs, first):
    run, heard, drawn = train(kinds_of(wrong=48), noise_guard=mode, num_epochs=epochs)
    assert heard.events
    assert heard.events[0].step >= first * run.steps_per_epoch
    assert all(len(epoch) == N for epoch in drawn[:first])


def test_a_run_that_is_too_short_to_judge_says_so():
    run, heard, drawn = train(kinds_of(wrong=48), num_epochs=5)
    assert not run.noise_guard.flagged.any()
    assert all(len(epoch) == N for epoch in drawn)
    [told] = [event for event in heard.events if isinstance(event, StrategyDecided)]
    assert told.decision == "noise guard judged nobody"
    assert told.reason == "samples were trained on 5.0 times on average, 8 tell wrong ones from hard"


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
    assert [event.decision for event in heard.events] == ["noise guard shut"]
    assert all(len(epoch) == N for epoch in drawn)


def test_samples_that_are_learned_late_are_not_suspected():
    kinds = kinds_of(rare=40)
    run, heard, drawn = train(kinds, num_epochs=25)
    assert not run.noise_guard.flagged.any()
    decisions = [event.decision for event in heard.events if isinstance(event, StrategyDecided)]
    assert decisions == ["noise guard shut"]
    assert all(len(epoch) == N for epoch in drawn)


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
def test_every_strategy_draws_wrong_samples_at_most_six_tenths_as_often_as_uniform(strategy):
    kinds = kinds_of(wrong=48)
    run, _, drawn = train(kinds, strategy=strategy, num_epochs=30)
    share = (kinds[np.concatenate(drawn)] == "wrong").mean()
    assert share <= 0.12
    assert run.noise_guard.flagged.sum() == pytest.approx(48, abs=6)


def test_suspects_take_turns_while_they_are_drawn_at_a_fifth_of_the_rate():
    guard, catalog = NoiseGuard("cap", 1000), LossCatalog(1000)
    everyone = np.arange(1000)
    wrong = everyone < 200
    masks = []
    for epoch in range(60):
        mask = guard.start_epoch(epoch / 60, np.random.default_rng(epoch))
        drawn = everyone if mask is None else everyone[~mask]
        losses = np.where(wrong[drawn], 5.0, 2.3 if epoch == 0 else 0.3).astype(np.float32)
        catalog.record(catalog.look_up(drawn), losses, epoch)
        guard.end_epoch(catalog, (epoch + 1) / 60)
        masks.append(np.zeros(1000, bool) if mask is None else mask)
    first = next(e for e, mask in enumerate(masks) if mask.any())
    assert first == 8
    guarded = np.array(masks)[first:]
    assert not guarded[:, ~wrong].any()
    drawn = (~guarded[:5, wrong]).sum(0)
    assert drawn.min() == drawn.max() == 1
    assert np.array(masks)[30:, wrong].all()


def driven(losses_of, epochs=30, mode="cap", groups=None, n=1000):
    """Drive a guard, resumed between all epochs, by `losses_of(epoch, ids)`; return it and its reports."""
    guard, catalog, reports = NoiseGuard(mode, n, groups), LossCatalog(n), []
    for epoch in range(epochs):
        mask = guard.start_epoch(epoch / epochs, np.random.default_rng(epoch))
        drawn = np.arange(n) if mask is None else np.flatnonzero(~mask)
        catalog.record(catalog.look_up(drawn), losses_of(epoch, drawn).astype(np.float32), epoch)
        reports.append(guard.end_epoch(catalog, (epoch + 1) / epochs))
        state, guard = guard.state_dict(), NoiseGuard(mode, n, groups)
        guard.load_state_dict(state)
    return guard, [report for report in reports if report is not None]


@pytest.mark.parametrize(
    ("wrong", "others", "believed"),
    [
        (5.0, 0.3, True),  # at random: far above what an untrained model of ten classes has
        (1.6, 0.22, True),  # a fifth is called one other class, and the model believes just that
        (1.6, 0.0005, False),  # the others are certain: a region is hard
        (0.6, 0.22, False),  # half learned
    ],
)
@pytest.mark.parametrize("mode", ["cap", "report"])
def test_a_fifth_of_high_losses_is_believed_where_the_others_lack_as_much_certainty(mode, wrong, others, believed):
    def losses(epoch, ids):
        return np.where(ids < 200, wrong, 2.3 if epoch == 0 else others)

    guard, reports = driven(losses, mode=mode)
    assert guard.flagged.sum() == (200 if believed else 0)
    opened = "noise guard open" if mode == "cap" else "suspects named"
    shut = ["noise guard shut"] if mode == "cap" else []
    assert [report.decision for report in reports if report.decision] == ([opened] if believed else shut)


def test_evidence_has_to_last():
    """While little is learned all losses are high: at one end of an epoch that looks like wrong labels, not at two."""

    def losses(epoch, ids, high):
        return np.where(ids < 200, 3.0 if epoch in high else 0.1, 0.3 if epoch in high else 0.001)

    for high, believed in (((6,), False), ((6, 7), True)):
        _, reports = driven(lambda epoch, ids, high=high: losses(epoch, ids, high))
        decisions = [report.decision for report in reports if report.decision]
        assert decisions == (["noise guard open"] if believed else ["noise guard shut"])


def test_suspects_that_have_fallen_when_they_return_are_released():
    def losses(epoch, ids):
        falls = (ids < 100) & (epoch > 7)
        return np.where((ids < 200) & ~falls, 3.0, 2.3 if epoch == 0 else 0.2)

    guard, _ = driven(losses, 60)
    assert guard.flagged[100:200].all()
    assert not guard.flagged[:100].any()
    assert not guard.flagged[200:].any()


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=80))
def test_the_cut_lies_between_two_losses_and_does_not_depend_on_order(losses):
    values = np.array(losses, np.float32)
    cut, parted = two_groups(values)
    assert two_groups(values[::-1].copy()) == (cut, parted)
    assert 0 <= parted <= 1 + 1e-9
    if values.min() == values.max():
        assert cut == np.inf
    elif len(values) < 80:
        assert values.min() <= cut <= values.max()


def test_the_cut_parts_two_groups_whatever_a_few_outliers_do():
    rng = np.random.default_rng(0)
    for share in (0.05, 0.1, 0.2, 0.4):
        wrong = rng.random(4000) < share
        losses = np.where(wrong, rng.normal(3.0, 0.4, 4000), rng.normal(0.5, 0.2, 4000)).astype(np.float32)
        losses[:8] = 1e5
        cut, parted = two_groups(losses)
        found = losses > cut
        assert parted > 0.7
        assert np.mean(found[8:] != wrong[8:]) < 0.005


def test_one_bell_is_not_two_groups():
    bell = np.random.default_rng(0).normal(2.0, 0.5, 4000).astype(np.float32)
    assert two_groups(bell)[1] < 0.69


@given(st.integers(1, 49), st.floats(0.01, 5), st.floats(0, 3))
def test_evidence_grows_with_the_suspects_loss_and_with_what_the_others_lack(suspects, high, low):
    losses = np.where(np.arange(100) < suspects, high, low).astype(np.float32)
    found = evidence(losses[:suspects], losses)
    lacking = -np.expm1(-np.quantile(losses, 0.25))
    assert found == pytest.approx(high * (lacking * 100 / suspects) ** 0.25, rel=1e-4, abs=1e-6)
    assert evidence(losses[:0], losses) == evidence(losses, losses) == 0


@pytest.mark.parametrize("mode", ["report", "cap"])
def test_losses_that_cannot_be_judged_are_told_once_to_who_wants_suspects_kept_out(mode):
    for value, said in ((-2.0, "below 0"), (0.0, "would have been needed")):
        guard, reports = driven(lambda epoch, ids, value=value: np.full(len(ids), value), 20, mode, n=100)
        assert [report.decision for report in reports] == (["noise guard shut"] if mode == "cap" else [])
        assert all(said in report.reason and report.count == 0 for report in reports)
        assert guard.start_epoch(1.0, np.random.default_rng(0)) is None


def test_predictions_tell_what_the_labels_of_suspects_should_be():
    kinds = kinds_of(wrong=48)
    true = np.arange(N) % 10
    given = np.where(kinds == "wrong", (true + 1) % 10, true)
    learner, rng = Learner(kinds), np.random.default_rng(3)
    arguments = {"num_epochs": EPOCHS, "noise_guard": "cap", "groups": given, "checkpoint_dir": None, "ui": "off"}
    run = R8Scheduler(N, 16, **arguments)
    for epoch in run.epoch_iterator():
        for batch in run.batch_iterator():
            guessed = np.where(rng.random(len(batch.indices)) < 0.9, true[batch.indices], given[batch.indices])
            run.update_with_loss(learner.train(batch.indices), predictions=guessed)
        if epoch == 9:
            later = R8Scheduler(N, 16, **arguments)
            later.load_state_dict(run.state_dict())
            assert later.noise_guard.suggestions.tolist() == run.noise_guard.suggestions.tolist()
    flagged, suggested = run.noise_guard.flagged, run.noise_guard.suggestions
    assert (suggested[~flagged] == -1).all()
    assert (suggested == true)[flagged & (kinds == "wrong")].all()
    some = np.flatnonzero(flagged)[:3]
    run.relabelled(some)
    assert (run.noise_guard.suggestions[some] == -1).all()
    assert (NoiseGuard("cap", 5).suggestions == -1).all()


@pytest.mark.parametrize(
    ("predictions", "error", "said"),
    [
        (np.zeros(3, int), ProtocolError, "8 samples"),
        (np.zeros((8, 2), int), ProtocolError, "shape"),
        (np.zeros(8), TypeError, "whole numbers"),
        ([0.5] * 8, TypeError, "whole numbers"),
        ("cats", TypeError, "got str"),
    ],
)
def test_predictions_that_are_none_are_refused_and_change_nothing(predictions, error, said):
    with R8Scheduler(16, 8, num_epochs=1, checkpoint_dir=None, ui="off") as run:
        batch = next(iter(run.batch_iterator()))
        with pytest.raises(error, match=said):
            run.update_with_loss(np.ones(8), predictions=predictions)
        assert run.global_step == 0
        run.update_with_loss(np.ones(8), batch, predictions=[1] * 8)
        assert run.global_step == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=40))
def test_a_majority_is_always_found(votes):
    kept = Votes(4, None)
    for index, chosen in votes:
        kept.add(np.array([index]), np.array([chosen]))
    for index in range(4):
        mine = [chosen for i, chosen in votes if i == index]
        most = [c for c in set(mine) if 2 * mine.count(c) > len(mine)]
        assert not most or kept.classes[index] == most[0]
        assert mine or kept.classes[index] == -1


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
    means = [np.mean(a) if a else np.nan for a in after]
    assert since.means(catalog) == pytest.approx(np.array(means), rel=1e-4, abs=1e-4, nan_ok=True)


def test_a_rollback_that_takes_uses_back_leaves_no_negative_counts():
    catalog = LossCatalog(3)
    ids = np.arange(3)
    catalog.record(catalog.look_up(ids), np.float32([1, 2, 3]), 0)
    later = LossesSince(np.float32([2, 2, 2]), np.uint32([4, 4, 4]))
    assert later.scores(catalog).tolist() == [2, 2, 2]
    assert np.isnan(later.means(catalog)).all()


def test_a_class_whose_labels_are_mostly_wrong_has_the_level_of_its_right_ones():
    groups = np.repeat([0, 1, 2], [200, 200, 100])
    losses = np.full(500, 0.1, np.float32)
    losses[440:] = 3.0
    classes = Classes(groups)
    np.testing.assert_allclose(classes.excess(losses)[400:], 2.9, rtol=1e-6)
    assert not classes.excess(losses, 0.15).any()
