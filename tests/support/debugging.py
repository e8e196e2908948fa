"""A project to debug, and what a person does with it at a terminal."""

SUITE = """
    import os

    def test_breakpoint():
        number = 41
        breakpoint()
        number += 1
        print("printed by the test")
        assert number == 42

    def test_fails():
        wanted = "w" * 3
        assert wanted == "xxx"

    def test_waits(capsys):
        breakpoint()
        with capsys.disabled():
            print("waiting")
            while True:
                pass
"""


def debug(terminal):
    """Set a breakpoint, print, step, continue; look at a failure; interrupt a test that hangs, and quit."""

    def answer(text):
        """Type a command at the prompt; return what the debugger says up to the next prompt."""
        terminal.type(text + "\n")
        return terminal.until("(Pdb) ")

    assert "PDB set_trace" in terminal.until("(Pdb) ")
    assert "\r\n41\r\n" in answer("p number")
    stepped = answer("n")
    if "-> number += 1" in stepped:  # since Python 3.13 pdb stops at the breakpoint itself, not after it
        stepped = answer("n")
    assert "-> print(" in stepped
    assert "\r\n100\r\n" in answer("p number + 58")
    assert "(100, 30)" in answer("import os; tuple(os.get_terminal_size(0))")
    terminal.resize(40, 123)
    sizes = (answer("tuple(os.get_terminal_size(0))") for _ in range(1000))
    assert any("(123, 40)" in size for size in sizes)  # the size travels on another way than the keys
    terminal.type("p 'same' + 'again'\n")  # readline may have shown its prompt again for the new size
    terminal.until("'sameagain'")
    terminal.until("(Pdb) ")

    shown = answer("c")
    assert "PDB continue" in shown
    assert "AssertionError" in shown
    assert "entering PDB" in shown
    assert "'www'" in answer("p wanted")

    assert "PDB set_trace" in answer("c")
    terminal.type("c\n")
    terminal.until("\nwaiting\r\n")
    terminal.type("\x03")
    terminal.until("(Pdb) ")
    assert "\r\n42\r\n" in answer("p 6 * 7")
    terminal.type("\x04")
    rest, status = terminal.end()
    assert "1 failed, 1 passed" in rest or "2 failed, 1 passed" in rest, rest
    assert status in (1, 2)  # whether pdb quits the test or pytest depends on the version
