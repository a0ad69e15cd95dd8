"""Recovery does what its table says, within its budgets, and names the samples that deserve it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnit_r8.errors import ConfigError, ProtocolError
from learnit_r8.stability.aftermath import AftermathSettings
from learnit_r8.stability.quarantine import Quarantine, named
from learnit_r8.stability.recovery import TABLE, Action, Kind, Phase, Recovery, RecoverySettings, Signal, state_diagram
from learnit_r8.types import Verdict

FAULTS = [Verdict.SPIKE, Verdict.DRIFT, Verdict.NONFINITE]


def calm(recovery, start, count=1, loss=1.0):
    return [recovery.react(start + k, Verdict.CALM, can_restore=True, loss=loss) for k in range(count)]


def fault(recovery, step, verdict=Verdict.SPIKE, **details):
    details = {"can_restore": True, "loss": 10.0, "batch_indices": [1, 2, 3], **details}
    return recovery.react(step, verdict, **details)


def healthy():
    recovery = Recovery(1000)
    calm(recovery, 0, 100)
    return recovery


def test_every_verdict_has_a_rule_in_every_phase_that_can_hear_one():
    for phase in Phase:
        if phase is not Phase.ROLLBACK:
            assert {signal for at, signal in TABLE if at is phase} >= set(Verdict)
    assert {signal for _, signal in TABLE} == {*Verdict, *Signal}


def test_every_phase_can_be_reached_and_only_failure_is_final():
    reached = {Phase.WARMUP} | {move.phase for move in TABLE.values()}
    assert reached == set(Phase)
    for phase in Phase:
        assert any(move.phase is not phase for (at, _), move in TABLE.items() if at is phase) == (
            phase is not Phase.FAILED
        )


def test_the_diagram_draws_each_change_of_phase_of_the_table_and_no_other():
    drawn = set()
    for line in state_diagram().splitlines():
        if ":" in line:
            arrow, signals = line.strip().split(": ")
            start, end = arrow.split(" --> ")
            drawn |= {(start, signal, end) for signal in signals.split(", ")}
    table = {(a.name, str(s), m.phase.name) for (a, s), m in TABLE.items() if m.phase is not a}
    assert drawn == table
    assert state_diagram().startswith("stateDiagram-v2\n    [*] --> WARMUP")


def test_calm_losses_are_accepted_and_lead_to_health():
    recovery = Recovery(10)
    actions = calm(recovery, 0, 15)
    assert recovery.phase is Phase.WARMUP
    actions += calm(recovery, 15)
    assert recovery.phase is Phase.HEALTHY
    assert {a.kind for a in actions} == {Kind.ACCEPT}
    assert recovery.aftermath.lr_multiplier(16) == 1.0


def test_a_suspect_loss_is_held_and_backups_wait_for_eight_calm_ones():
    recovery = healthy()
    assert recovery.react(100, Verdict.SUSPECT, can_restore=True).kind is Kind.HOLD
    for step in range(101, 109):
        assert not recovery.backups_allowed
        calm(recovery, step)
    assert recovery.backups_allowed


def test_a_skipped_step_changes_nothing():
    recovery = healthy()
    before = recovery.state_dict()
    assert recovery.react(100, Verdict.SKIPPED, can_restore=True).kind is Kind.IGNORE
    after = recovery.state_dict()
    assert {k for k in after if str(after[k]) != str(before[k])} == {"reports"}


@pytest.mark.parametrize("verdict", FAULTS)
def test_a_fault_asks_for_a_backup_older_than_the_first_suspect_step(verdict):
    recovery = healthy()
    action = fault(recovery, 103, verdict, first_suspect_step=101)
    assert (action.kind, action.source, action.before_step, action.discard) == (Kind.RESTORE, "ram", 101, None)
    recovery.rolled_back(103, 80, 5)
    assert recovery.phase is Phase.PROBATION
    assert recovery.stable_only(104)


def test_the_lr_is_halved_held_and_led_back_geometrically():
    recovery = healthy()
    fault(recovery, 100)
    recovery.rolled_back(100, 80, 1)
    factors = np.array([recovery.aftermath.lr_multiplier(101 + k) for k in range(82)])
    assert (factors[:40] == 0.5).all()
    ramp = factors[40:81]
    assert ramp[-1] == 1.0
    np.testing.assert_allclose(ramp[1:] / ramp[:-1], 2 ** (1 / 40))
    assert factors[81] == 1.0
    calm(recovery, 101, 40)
    assert recovery.phase is Phase.PROBATION
    calm(recovery, 141)
    assert recovery.phase is Phase.HEALTHY
    assert not recovery.stable_only(142)


def test_three_triggers_during_one_recovery_halve_the_peak_for_good():
    recovery, step = healthy(), 100
    for k in range(4):
        fault(recovery, step, loss=10.0**k)
        recovery.rolled_back(step, step - 1, k)
        step += 20
    assert recovery.aftermath.lr_multiplier(10**6) == 0.5
    assert recovery.aftermath.lr_multiplier(step) == 0.5 / 16


def test_the_lr_factor_of_one_recovery_has_a_floor():
    recovery = Recovery(1000, RecoverySettings(per_span=100), AftermathSettings(triggers_to_halve=1000))
    calm(recovery, 0, 20)
    for k in range(12):
        fault(recovery, 100 + k, Verdict.NONFINITE)
        recovery.rolled_back(100 + k, 99, k)
    assert recovery.aftermath.lr_multiplier(112) == 1 / 64


def back(recovery, step, calm_since, *, to=0, backup=7, loss=10.0, suspect=1, **details):
    """Let a fault that was suspected a step before follow calm losses, and roll back; return the backup discarded."""
    calm(recovery, step - calm_since, calm_since)
    action = fault(recovery, step, Verdict.NONFINITE, loss=loss, first_suspect_step=step - suspect)
    recovery.rolled_back(step, to, backup, **details)
    return action.discard


def test_a_backup_whose_own_loss_is_faulty_is_discarded_at_once():
    recovery = healthy()
    assert back(recovery, 100, 0) is None
    assert back(recovery, 101, 0) == 7


def test_a_fault_that_takes_as_long_as_before_is_in_the_backup():
    recovery = healthy()
    assert back(recovery, 160, 60, to=100) is None  # it shows 60 steps after the backup
    assert back(recovery, 225, 64, to=80, backup=8) == 7  # and again
    assert back(recovery, 255, 29, to=80, backup=8) is None  # this one sooner: something else


def test_a_fault_that_goes_on_outside_costs_a_backup_at_its_second_return_only():
    recovery = healthy()
    assert back(recovery, 140, 40, to=100) is None
    assert back(recovery, 143, 2, to=100) is None
    assert back(recovery, 146, 2, to=60, backup=3) == 7
    assert recovery.aftermath.lr_multiplier(147) == 1 / 8


def test_a_backup_is_used_three_times_at_most():
    recovery = healthy()
    discarded = [back(recovery, 200, 100, to=100), back(recovery, 230, 29, to=100)]
    discarded += [back(recovery, 255, 24, to=100), back(recovery, 280, 24, to=100)]
    assert discarded == [None, None, None, 7]


def test_faults_with_healthy_stretches_between_them_are_no_loop():
    recovery, step = healthy(), 100
    for _ in range(6):
        step += 100
        assert back(recovery, step, 99, to=step - 10) is None


def test_sudden_faults_use_no_backup_up_and_backups_go_on_soon():
    recovery, step = healthy(), 160
    assert back(recovery, step, 60, to=100, suspect=0) is None
    for _ in range(8):  # as late after the restore as each other, which would speak against the backup had they grown
        calm(recovery, step + 1, 16)
        assert not recovery.backups_allowed
        calm(recovery, step + 17, 1)
        assert recovery.backups_allowed
        step += 25
        assert back(recovery, step, 7, to=100, suspect=0) is None


def test_no_backup_is_taken_until_the_last_one_has_passed_its_trial():
    recovery = healthy()
    back(recovery, 160, 60, to=100)
    calm(recovery, 161, 90)
    assert not recovery.backups_allowed
    calm(recovery, 251)
    assert recovery.phase is Phase.PROBATION
    assert recovery.backups_allowed


def test_the_initial_state_gets_its_three_rollbacks_and_then_the_batch_is_named():
    recovery = Recovery(1000)
    for _ in range(3):
        action = fault(recovery, 0, Verdict.NONFINITE, first_suspect_step=0, batch_indices=[41, 42])
        assert (action.kind, action.discard) == (Kind.RESTORE, None)
        recovery.rolled_back(0, 0, 1, last_resort=True, resumes_at=0)
    action = fault(recovery, 0, Verdict.NONFINITE, batch_indices=[41, 42])
    assert action.discard == 1
    assert recovery.restore_failed(0, "none", empty=True).source == "disk"
    last = recovery.restore_failed(0, "none", empty=True)
    assert last.kind is Kind.FAIL
    assert "[41, 42]" in last.reason
    assert recovery.failing_batches == [[41, 42]] * 3
    assert fault(recovery, 1).kind is Kind.FAIL
    assert calm(recovery, 2)[0].kind is Kind.FAIL


def test_eleven_rollbacks_within_a_thousand_steps_are_divergence():
    recovery, step = healthy(), 100
    for k in range(10):
        assert fault(recovery, step, Verdict.NONFINITE).kind is Kind.RESTORE
        recovery.rolled_back(step, step - 10, k)
        calm(recovery, step + 1, 50)
        step += 51
    assert fault(recovery, step, Verdict.NONFINITE).kind is Kind.FAIL
    assert recovery.phase is Phase.FAILED


def test_old_rollbacks_leave_the_budget():
    recovery, step = healthy(), 100
    for k in range(30):
        assert fault(recovery, step, Verdict.NONFINITE).kind is Kind.RESTORE
        recovery.rolled_back(step, step - 10, k)
        calm(recovery, step + 1, 120)
        step += 121


def test_failed_restores_escalate_from_a_fresh_copy_to_older_backups_to_older_checkpoints():
    recovery = healthy()
    tried = [fault(recovery, 100)]
    tried.append(recovery.restore_failed(100, "raised", backup_id=3))
    tried.append(recovery.restore_failed(100, "raised", backup_id=3))
    tried.append(recovery.restore_failed(100, "no backup", empty=True))
    tried.append(recovery.restore_failed(100, "raised"))
    tried.append(recovery.restore_failed(100, "raised"))
    end = recovery.restore_failed(100, "no checkpoint", empty=True)
    assert [(a.source, a.skip, a.discard) for a in tried] == [
        ("ram", 0, None), ("ram", 0, None), ("ram", 0, 3), ("disk", 0, None), ("disk", 0, None), ("disk", 1, None),
    ]  # fmt: skip
    assert {a.before_step for a in tried} == {100}
    assert end.kind is Kind.FAIL
    assert "no checkpoint" in end.reason


def test_a_checkpoint_that_leads_to_another_fault_at_once_is_passed_over():
    recovery = healthy()
    fault(recovery, 100, Verdict.NONFINITE)
    recovery.restore_failed(100, "none", empty=True)
    recovery.rolled_back(100, 50, None)
    fault(recovery, 101, Verdict.NONFINITE)
    assert recovery.restore_failed(101, "none", empty=True).skip == 1


def test_without_a_way_to_restore_ten_nonfinite_losses_in_a_row_are_divergence():
    recovery = healthy()
    for k in range(9):
        assert fault(recovery, 100 + k, Verdict.NONFINITE, can_restore=False).kind is Kind.DROP
    calm(recovery, 109)
    kinds = [fault(recovery, 110 + k, Verdict.NONFINITE, can_restore=False).kind for k in range(10)]
    assert kinds == [Kind.DROP] * 9 + [Kind.FAIL]


def test_without_a_way_to_restore_finite_losses_count_and_their_level_is_accepted_in_the_end():
    recovery = healthy()
    kinds = [fault(recovery, 100 + k, can_restore=False, loss=2.0**k).kind for k in range(10)]
    assert kinds == [Kind.HOLD] * 9 + [Kind.ACCEPT_LEVEL]


@pytest.mark.parametrize(
    ("losses", "end"),
    [
        ((10.0, 11.0, 9.0), Kind.ACCEPT_LEVEL),
        ((10.0, 20.0, 40.0), Kind.RESTORE),
        ((10.0, 12.5, 16.0), Kind.RESTORE),
        ((10.0, 3.0, 10.0), Kind.RESTORE),
    ],
)
def test_the_same_level_after_two_rollbacks_is_accepted_and_growth_is_not(losses, end):
    recovery, step = healthy(), 100
    for k, loss in enumerate(losses):
        action = fault(recovery, step, loss=loss)
        if action.kind is Kind.RESTORE:
            recovery.rolled_back(step, step - 10, k)
            calm(recovery, step + 1, 2)
        step += 3
    assert action.kind is end


def roll_back(recovery, step, **details):
    assert fault(recovery, step, **details).kind is Kind.RESTORE
    recovery.rolled_back(step, step - 10, step)


def test_a_level_counts_as_held_after_rollbacks_only_not_after_restores_that_were_abandoned():
    recovery = healthy()
    for step in (100, 103):
        fault(recovery, step)
        recovery.restore_abandoned()
    assert fault(recovery, 106).kind is Kind.RESTORE


def test_a_level_is_forgotten_with_the_rollbacks_that_led_to_it():
    recovery = healthy()
    for step in (100, 103):
        roll_back(recovery, step)
    for step in range(104, 104 + recovery.settings.span):
        recovery.react(step, Verdict.SKIPPED, can_restore=True)
    assert fault(recovery, 2000).kind is Kind.RESTORE


def test_a_level_that_took_time_to_come_back_is_not_held():
    recovery = healthy()
    for step in (100, 103):
        roll_back(recovery, step)
    calm(recovery, 104, 40)
    assert fault(recovery, 144).kind is Kind.RESTORE


def test_a_level_that_was_accepted_asks_for_two_more_rollbacks_before_the_next_is():
    recovery = healthy()
    for step in (100, 103):
        roll_back(recovery, step)
    assert fault(recovery, 106).kind is Kind.ACCEPT_LEVEL
    assert fault(recovery, 107).kind is Kind.RESTORE


def test_a_verdict_amid_a_rollback_is_refused():
    recovery = healthy()
    fault(recovery, 100)
    with pytest.raises(ProtocolError, match="report how the restore went"):
        fault(recovery, 101)


def test_bad_settings_are_listed_together():
    with pytest.raises(ConfigError, match="2 problems"):
        RecoverySettings(span=0, per_span=-1)
    with pytest.raises(ConfigError, match="2 problems"):
        AftermathSettings(per_backup=0, min_factor=-1.0)


def test_a_nonfinite_sample_is_quarantined_at_its_second_fault():
    rng, recovery, found = np.random.default_rng(0), healthy(), []
    for k in range(2):
        ids = np.append(rng.choice(500, 63, replace=False) + 500, 7)
        losses = np.ones(64)
        losses[-1] = np.nan
        found.append(
            fault(recovery, 100 + 30 * k, Verdict.NONFINITE, batch_indices=ids, sample_losses=losses).quarantine
        )
        recovery.rolled_back(100 + 30 * k, 90, k)
        calm(recovery, 101 + 30 * k, 20)
    assert found == [(), (7,)]
    assert recovery.quarantined.tolist() == [7]


def test_the_sample_that_broke_the_weights_a_step_earlier_is_the_one_that_is_named():
    rng, recovery, found = np.random.default_rng(0), healthy(), ()
    for k in range(2):
        step = 100 + 30 * k
        losses = rng.gamma(4, 0.25, 64)
        losses[5] = 400.0
        ids = rng.choice(500, 64, replace=False) + 500
        ids[5] = 7
        recovery.react(step, Verdict.SUSPECT, can_restore=True, batch_indices=ids, sample_losses=losses)
        broken = rng.choice(1000, 64, replace=False)
        found = fault(recovery, step + 1, batch_indices=broken, sample_losses=np.full(64, 50.0) + losses).quarantine
        recovery.rolled_back(step + 1, 90, k)
        calm(recovery, step + 2, 20)
    assert 7 in found
    assert len(found) <= 2


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
        quarantine.trigger()
    assert samples - 1 in quarantine.ids
    assert quarantine.ids.size <= 2


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
    st.tuples(st.sampled_from([*Verdict] + [Verdict.CALM] * 20), st.booleans(), st.integers(0, 3), st.floats(0, 50)),
    max_size=150,
)


def drive(recovery, history, start):
    """Answer every action as a scheduler would; the outcome of restores is part of the history."""
    log = []
    for step, (verdict, can_restore, failures, loss) in enumerate(history, start):
        action = recovery.react(
            step, verdict, can_restore=can_restore, batch_indices=range(step % 7, step % 7 + 4), loss=loss
        )
        log.append(action)
        tries = 0
        while action.kind is Kind.RESTORE and tries < failures:
            tries += 1
            action = recovery.restore_failed(step, "failed", backup_id=step, empty=tries % 2 == 0)
            log.append(action)
        if action.kind is Kind.RESTORE:
            recovery.rolled_back(step, max(0, step - 20), step % 3)
        log += [recovery.phase, recovery.aftermath.lr_multiplier(step + 1), recovery.stable_only(step + 1)]
    return log


@settings(max_examples=100, deadline=None)
@given(events, st.integers(0, 150))
def test_a_restored_machine_acts_on_exactly_as_the_first_would(history, cut):
    first, second = Recovery(50), Recovery(50)
    drive(first, history[:cut], 0)
    state = first.state_dict()
    ids = state["quarantine"].pop("ids")
    state = json.loads(json.dumps(state, allow_nan=False))
    state["quarantine"]["ids"] = ids
    second.load_state_dict(state)
    assert drive(first, history[cut:], cut) == drive(second, history[cut:], cut)


@settings(max_examples=100, deadline=None)
@given(events)
def test_whatever_happens_no_restore_is_left_open_and_the_lr_stays_in_bounds(history):
    recovery = Recovery(50)
    for entry in drive(recovery, history, 0):
        assert entry is not Phase.ROLLBACK
        if isinstance(entry, float):
            assert 0.0 < entry <= 1.0
        if isinstance(entry, Action) and entry.kind not in (Kind.ACCEPT, Kind.IGNORE):
            assert entry.reason
