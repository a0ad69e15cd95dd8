"""Recovery does what its table says, in proportion to the cause, and names the samples that deserve it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8 import Recovery
from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.stability.quarantine import Quarantine, named, not_finite
from learnit_r8.stability.recovery import TABLE, Action, Cause, Kind, Phase, RecoveryMachine, Signal


def calm(machine, start, count=1):
    return [machine.react(start + k, Cause.CALM) for k in range(count)]


def damage(machine, step, **details):
    return machine.react(step, Cause.DAMAGE, **{"can_restore": True, "batch": [1, 2, 3], "why": "broken", **details})


def healthy():
    machine = RecoveryMachine()
    calm(machine, 0, 100)
    return machine


def test_every_cause_has_a_rule_in_every_phase_that_can_hear_one():
    for phase in Phase:
        if phase is not Phase.ROLLBACK:
            assert {signal for at, signal in TABLE if at is phase} >= set(Cause)
    assert {signal for _, signal in TABLE} == {*Cause, *Signal}


def test_every_phase_can_be_reached_and_only_failure_is_final():
    reached = {Phase.HEALTHY} | {move.phase for move in TABLE.values()}
    assert reached == set(Phase)
    for phase in Phase:
        assert any(move.phase is not phase for (at, _), move in TABLE.items() if at is phase) == (
            phase is not Phase.FAILED
        )


def test_calm_losses_are_accepted():
    assert {action.kind for action in calm(RecoveryMachine(), 0, 50)} == {Kind.ACCEPT}


def test_an_outlier_is_held_and_backups_wait_for_the_next_calm_loss():
    machine = healthy()
    assert machine.react(100, Cause.OUTLIER).kind is Kind.HOLD
    assert machine.phase is Phase.QUESTION
    assert not machine.backups_allowed
    calm(machine, 101, 1)
    assert machine.backups_allowed
    calm(machine, 102, 7)
    assert machine.phase is Phase.HEALTHY


def test_a_report_that_is_not_finite_while_the_model_is_changes_nothing_but_is_left_out():
    machine = healthy()
    for step in range(100, 103):
        assert machine.react(step, Cause.REPORT, finite=False).kind is Kind.IGNORE
    assert machine.phase is Phase.HEALTHY
    assert machine.lr_multiplier(103) == 1.0
    assert calm(machine, 103)[0].kind is Kind.ACCEPT


def test_a_jump_that_the_weights_do_not_explain_is_held_and_its_level_accepted_after_16_losses():
    machine = healthy()
    kinds = [machine.react(100 + k, Cause.JUMP).kind for k in range(16)]
    assert kinds == [Kind.HOLD] * 15 + [Kind.ACCEPT_LEVEL]
    assert machine.phase is Phase.HEALTHY
    kinds = [machine.react(200 + k, Cause.JUMP, seen=False).kind for k in range(32)]
    assert kinds == [Kind.HOLD] * 31 + [Kind.ACCEPT_LEVEL]


def test_damage_asks_for_a_backup_from_before_it_and_leaves_the_rate_alone():
    machine = healthy()
    action = damage(machine, 100, before_step=97)
    assert (action.kind, action.source, action.before_step) == (Kind.RESTORE, "ram", 97)
    assert action.unproven
    machine.rolled_back(100, 96, 12)
    assert machine.phase is Phase.TRIAL
    assert machine.lr_multiplier(101) == 1.0
    assert not machine.stable_only(101)


def test_eight_calm_losses_acquit_a_backup_whatever_comes_later():
    machine = healthy()
    for k in range(30):  # faults eleven steps apart, for ever: each costs what it costs
        step = 100 + 11 * k
        assert damage(machine, step).kind is Kind.RESTORE
        machine.rolled_back(step, step - 9, 5)
        calm(machine, step + 1, 8)
        assert machine.phase is Phase.HEALTHY
        assert machine.lr_multiplier(step + 9) == 1.0


def test_a_fault_that_returns_at_once_halves_the_rate_for_a_while_and_then_tries_an_older_backup():
    machine = RecoveryMachine(hold=50)
    calm(machine, 0, 100)
    damage(machine, 100)
    machine.rolled_back(100, 80, 12)
    calm(machine, 101, 2)
    again = damage(machine, 103)
    assert not again.unproven
    assert again.before_step is None
    assert [machine.lr_multiplier(step) for step in (104, 153, 154)] == [0.5, 0.5, 1.0]
    assert machine.stable_only(104)
    assert not machine.stable_only(112)
    machine.rolled_back(103, 80, 12)
    calm(machine, 104, 2)
    assert damage(machine, 106).before_step == 80
    machine.rolled_back(106, 64, 8)
    calm(machine, 107, 8)
    assert damage(machine, 200).before_step is None  # acquitted: the next fault begins anew


def test_a_fault_that_takes_as_long_as_before_grows_in_the_backup():
    machine = healthy()
    damage(machine, 100)
    machine.rolled_back(100, 86, 12)
    calm(machine, 101, 10)
    assert machine.phase is Phase.HEALTHY
    for step in range(111, 114):
        machine.react(step, Cause.OUTLIER)
    assert damage(machine, 114).before_step == 86


def test_a_fault_that_the_batch_explains_blames_no_backup_and_no_rate():
    machine = healthy()
    for step in range(100, 140):
        assert damage(machine, step, finite=False, explained=step > 100).kind is Kind.RESTORE
        machine.rolled_back(step, 96, 12)
    assert machine.lr_multiplier(140) == 1.0
    calm(machine, 140, 8)
    assert machine.phase is Phase.HEALTHY


def test_ten_returns_without_an_acquittal_are_a_divergence():
    machine, kinds = healthy(), []
    for k in range(12):
        action = damage(machine, 100 + 2 * k, finite=False)
        kinds.append(action.kind)
        if action.kind is Kind.FAIL:
            break
        machine.rolled_back(100 + 2 * k, 96, 12)
        calm(machine, 101 + 2 * k)
    assert kinds == [Kind.RESTORE] * 10 + [Kind.FAIL]
    assert "10 times" in action.reason
    assert machine.lacks  # NaN out of calm losses, each time: the backup is not whole
    assert machine.react(200, Cause.CALM).kind is Kind.FAIL


def test_64_losses_in_a_row_that_are_not_finite_end_a_run_of_a_sound_model():
    machine = healthy()
    kinds = [machine.react(100 + k, Cause.REPORT, finite=False).kind for k in range(64)]
    assert kinds == [Kind.IGNORE] * 63 + [Kind.FAIL]


def test_failed_restores_escalate_from_a_fresh_copy_to_older_checkpoints():
    machine = healthy()
    damage(machine, 100, before_step=98)
    steps = [machine.restore_failed("no")]
    assert (steps[-1].source, steps[-1].before_step) == ("ram", 98)  # the same with a fresh copy
    for source, skip in (("disk", 0), ("disk", 0), ("disk", 1), ("disk", 1), ("disk", 2)):
        steps.append(machine.restore_failed("no"))
        assert (steps[-1].kind, steps[-1].source, steps[-1].skip) == (Kind.RESTORE, source, skip)
    assert machine.restore_failed("nothing there", empty=True).kind is Kind.FAIL


def test_without_a_way_to_restore_ten_damages_in_a_row_are_divergence():
    machine = healthy()
    kinds = [damage(machine, 100 + k, can_restore=False, finite=False).kind for k in range(10)]
    assert kinds == [Kind.IGNORE] * 9 + [Kind.FAIL]


def test_a_cause_amid_a_rollback_is_refused():
    machine = healthy()
    damage(machine, 100)
    with pytest.raises(ProtocolError, match="report how the restore went"):
        damage(machine, 101)


def test_a_policy_checks_itself_and_has_names():
    assert Recovery.read("auto") == Recovery("rollback", "rollback", "report")
    assert Recovery.read("off") == Recovery(nonfinite="off", spike="off", drift="off")
    assert Recovery.read("never") is None
    with pytest.raises(ConfigError, match="2 problems"):
        Recovery(nonfinite="yes", drift=3)


def test_samples_are_told_from_weights_by_the_rest_of_their_batch():
    ids = np.arange(8)
    losses = np.array([1, 2, np.nan, 1, np.inf, 1, 1, 1], np.float32)
    found, others = not_finite(ids, losses, 1e15)
    assert found.tolist() == [2, 4]
    assert others == pytest.approx(7 / 6)
    assert not_finite(ids, np.full(8, np.nan, np.float32), 1e15)[0].size == 0
    assert not_finite(ids, np.ones(8, np.float32), 1e15)[0].size == 0
    assert not_finite(ids, None, 1e15)[0].size == 0


@pytest.mark.parametrize(("batch", "samples"), [(256, 1000), (32, 1797), (32, 50_000), (8, 100), (500, 1000)])
def test_chance_alone_hardly_ever_quarantines_a_sample_of_unknown_loss(batch, samples):
    wrong = 0
    for seed in range(100):
        rng, quarantine = np.random.default_rng(seed), Quarantine(samples)
        for _ in range(6):
            quarantine.suspect(rng.choice(samples, batch, replace=False), None)
            wrong += bool(quarantine.trigger())
    assert wrong <= 25  # each of 600 decisions is bound to 5%


@pytest.mark.parametrize(("batch", "samples", "faults"), [(32, 50_000, 2), (32, 1797, 3), (8, 1000, 3), (64, 1000, 5)])
def test_a_sample_in_every_faulty_batch_is_found_without_knowing_its_loss(batch, samples, faults):
    rng, quarantine = np.random.default_rng(0), Quarantine(samples)
    for _ in range(faults):
        quarantine.suspect(np.append(rng.choice(samples - 1, batch - 1, replace=False), samples - 1), None)
        found = quarantine.trigger()
    assert samples - 1 in found
    assert len(found) <= 2


def test_a_replayed_batch_is_not_evidence_against_all_its_samples():
    quarantine = Quarantine(100_000)
    for _ in range(5):
        quarantine.suspect(range(32), None)
        assert quarantine.trigger() == ()


def test_samples_are_named_only_where_few_stand_out():
    ids = np.arange(16)
    losses = np.linspace(1, 2, 16)
    assert named(ids, losses) == (False, pytest.approx(ids))
    losses[3] = 90.0
    assert named(ids, losses)[1].tolist() == [3]
    losses[9] = np.inf
    assert named(ids, losses)[1].tolist() == [9]
    precise, everything = named(ids, np.full(16, np.nan))
    assert not precise
    assert everything.size == 16


events = st.lists(
    st.tuples(
        st.sampled_from([*Cause] + [Cause.CALM] * 20), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3)
    ),
    max_size=150,
)


def drive(machine, history, start):
    """Answer every action as a scheduler would; the outcome of restores is part of the history."""
    log = []
    for step, (cause, can_restore, finite, explained, failures) in enumerate(history, start):
        action = machine.react(
            step,
            cause,
            can_restore=can_restore,
            finite=finite,
            explained=explained,
            batch=range(step % 7, step % 7 + 4),
        )
        log.append(action)
        tries = 0
        while action.kind is Kind.RESTORE and tries < failures:
            tries += 1
            action = machine.restore_failed("failed", empty=tries % 2 == 0)
            log.append(action)
        if action.kind is Kind.RESTORE:
            machine.rolled_back(step, max(0, step - 20), step % 3)
        log += [machine.phase, machine.lr_multiplier(step + 1), machine.stable_only(step + 1)]
    return log


@settings(max_examples=100, deadline=None)
@given(events, st.integers(0, 150))
def test_a_restored_machine_acts_on_exactly_as_the_first_would(history, cut):
    first, second = RecoveryMachine(), RecoveryMachine()
    drive(first, history[:cut], 0)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second.load_state_dict(state)
    if first.phase is Phase.FAILED:  # a run that has diverged may be tried again
        assert second.phase is Phase.HEALTHY
        return
    assert drive(first, history[cut:], cut) == drive(second, history[cut:], cut)


@settings(max_examples=100, deadline=None)
@given(events)
def test_whatever_happens_no_restore_is_left_open_and_the_lr_stays_in_bounds(history):
    for entry in drive(RecoveryMachine(), history, 0):
        assert entry is not Phase.ROLLBACK
        if isinstance(entry, float):
            assert 1 / 8 <= entry <= 1.0
        if isinstance(entry, Action) and entry.kind not in (Kind.ACCEPT, Kind.IGNORE, Kind.TELL, Kind.RESTORE):
            assert entry.reason or entry.kind is Kind.FAIL
