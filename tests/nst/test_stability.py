import logging

import pytest

from nst.stability import MIN_REPORTS, Alarms, SuccessGate


def test_the_gate_closes_after_steps_of_success_and_opens_at_once():
    gate = SuccessGate(0.9, num_steps=3)
    for _ in range(2):
        gate.observe(0.95)
    assert gate.is_open
    gate.observe(0.95)
    assert not gate.is_open
    gate.observe(0.7)
    assert gate.is_open


def test_a_gate_at_one_never_closes():
    gate = SuccessGate(1.0, num_steps=1)
    gate.observe(1.0)
    assert gate.is_open


def test_a_gate_remembers():
    gate, other = SuccessGate(0.9, num_steps=3), SuccessGate(0.9, num_steps=3)
    for _ in range(2):
        gate.observe(0.95)
    other.recall(gate.memory())
    other.observe(0.95)
    assert not other.is_open


HEALTHY = {"guessing": 0.5, "cosine": 0.1, "sensitivity": 0.3}


@pytest.mark.parametrize(
    ("figure", "value", "alarm", "says"),
    [
        ("guessing", 1.0, "style_encoder_collapsed", "no longer tells artists apart"),
        ("cosine", 0.99, "embeddings_alike", "nearly the same vector"),
        ("sensitivity", 0.001, "style_ignored", "ignores the style"),
    ],
)
def test_an_alarm_goes_up_once_with_a_warning_and_comes_down(figure, value, alarm, says, caplog):
    alarms = Alarms()
    for _ in range(MIN_REPORTS):
        assert not any(alarms.observe(HEALTHY, gate_is_open=True).values())
    with caplog.at_level(logging.WARNING):
        for _ in range(40):
            raised = alarms.observe({**HEALTHY, figure: value}, gate_is_open=True)
    assert {name for name, up in raised.items() if up} == {f"alarm/{alarm}"}
    assert [says in record.message for record in caplog.records] == [True]
    for _ in range(40):
        raised = alarms.observe(HEALTHY, gate_is_open=True)
    assert not any(raised.values())


def test_a_closed_gate_is_an_alarm():
    assert Alarms().observe({}, gate_is_open=False)["alarm/discriminator_too_strong"] == 1


def test_a_training_that_begins_is_no_collapse():
    alarms = Alarms()
    for _ in range(MIN_REPORTS - 1):
        raised = alarms.observe({"guessing": 1.0, "sensitivity": 0.0}, gate_is_open=True)
        assert not any(raised.values())


def test_alarms_remember():
    alarms, other = Alarms(), Alarms()
    for _ in range(MIN_REPORTS):
        alarms.observe({"cosine": 0.99}, gate_is_open=True)
    other.recall(alarms.memory())
    assert other.observe({"cosine": 0.99}, gate_is_open=True)["alarm/embeddings_alike"] == 1
