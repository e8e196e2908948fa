"""What a guest's console tells about its boot; the guest is at the other end of a socket."""

import socket
import threading

import pytest

from pytest_microvm.hypervisors.trial import ALIVE, BOOTED, BootLimits, watch

PATIENT = BootLimits(first=60.0, silence=60.0, total=60.0)


@pytest.fixture
def judge():
    """Return what is judged of a guest that says pieces, each after so many seconds; 0: from the begin."""

    def run(*pieces, limits=PATIENT, ends=False):
        ours, guest = socket.socketpair()
        over = threading.Event()
        said = []

        later = [pair for pair in pieces if pair[0]]
        for _seconds, piece in pieces[: len(pieces) - len(later)]:
            guest.sendall(piece)

        def talk():
            for seconds, piece in later:
                over.wait(seconds)
                guest.sendall(piece)
            if ends:
                guest.close()

        talker = threading.Thread(target=talk)
        talker.start()
        try:
            return watch(ours, limits, said.append), said
        finally:
            over.set()
            talker.join()
            ours.close()
            guest.close()

    return run


def test_it_boots(judge):
    trial, said = judge((0, b"firmware\n"), (0, b"[0] " + ALIVE + b"\n"), (0, BOOTED))
    assert (trial.end, trial.last, said) == ("booted", "", [])


def test_words_come_in_any_pieces(judge):
    pieces = [(1e-6, bytes([byte])) for byte in b"x" * 5000 + ALIVE + b"\n" + BOOTED]
    assert judge(*pieces)[0].end == "booted"


def test_it_ends_before_it_has_booted(judge):
    trial, _said = judge((0, ALIVE + b" 6\nreboot: Power down\r\n\r\n"), ends=True)
    assert (trial.end, trial.last) == ("died", "reboot: Power down")


def test_a_panics_reason_is_told(judge):
    pieces = [(0, ALIVE + b"\n"), (0, b"[1] Kernel panic - not syncing: no init\n[1] Offset: 7\n")]
    assert judge(*pieces, ends=True)[0].last == "[1] Kernel panic - not syncing: no init"


def test_it_ends_without_a_word(judge):
    trial, _said = judge(ends=True)
    assert (trial.end, trial.last) == ("died", "")


def test_the_firmware_alone_is_no_sign_of_life(judge):
    trial, said = judge((0, b"Probing EDD... ok\n"), limits=BootLimits(0.2, 60.0, 60.0))
    assert (trial.end, trial.last, said) == ("hung", "Probing EDD... ok", [])


def test_after_a_sign_of_life_silence_may_last_longer(judge):
    trial, _said = judge((0, ALIVE), (0.5, BOOTED), limits=BootLimits(0.2, 60.0, 60.0))
    assert trial.end == "booted"


def test_it_falls_silent_after_a_sign_of_life(judge):
    trial, _said = judge((0, ALIVE + b" 6.1\n"), limits=BootLimits(60.0, 0.2, 60.0))
    assert (trial.end, trial.last) == ("hung", "Linux version 6.1")


def test_it_boots_on_and_on(judge, monkeypatch):
    monkeypatch.setattr("pytest_microvm.hypervisors.trial._TELL_AFTER", 0.2)
    trial, said = judge((0, ALIVE), *[(0.1, b"\n")] * 100, limits=BootLimits(60.0, 60.0, 1.0))
    assert trial.end == "slow"
    assert trial.seconds >= 1.0
    assert said
    assert said[0].startswith("the guest is booting, slowly (")


def test_the_last_line_is_safe_to_print(judge):
    trial, _said = judge((0, b"a\n\x1b]0;title\x07\x1b[2J" + b"\xff" * 9000), ends=True)
    assert "\x1b" not in trial.last
    assert len(trial.last) <= 200
