"""From asking for a machine to the result of ``run(["true"])``, without and with a pool; and its end."""

from __future__ import annotations

from measure import Samples, promise

from pytest_microvm.host.host import Host

ROUNDS = 20


def main() -> list[dict[str, object]]:
    """Measure, print, and return what was promised."""
    host = Host(say=print)
    host.start().close()  # makes the template
    cold, warm, end = Samples(), Samples(), Samples()
    for _ in range(ROUNDS):
        with cold.timing():
            machine = host.start()
            machine.run(["true"], check=True)
        with end.timing():
            machine.close()
    for _ in range(ROUNDS + 1):
        with warm.timing():
            machine = host.start(pool=1)
            machine.run(["true"], check=True)
        machine.run("for i in 1 2 3; do true; done", check=True)
        host.wait_ready()  # the next one is ready before it is asked for
        with end.timing():
            machine.close()
    warm.values.pop(0)  # the pool was empty then
    host.close()
    print(f"without a pool  {cold} s")
    print(f"from the pool   {warm} s")
    print(f"destroying      {end} s")
    return [
        promise('fixture to run(["true"]), no pool', cold.median, 0.40, " s"),
        promise('fixture to run(["true"]), from the pool', warm.median, 0.10, " s"),
        promise("destroying a machine", end.median, 0.05, " s"),
    ]


if __name__ == "__main__":
    main()
