"""The agent as an ordinary process of this computer, on an inherited socket (see tests/contract/conftest.py).

Everything of the agent is real except what would change the computer itself: it is not PID 1, does not
end the computer when it ends, and does not take over another name, time or machine id.
"""

import sys

from pytest_microvm.guest.agent import Agent
from pytest_microvm.guest.port import Port

if __name__ == "__main__":
    local = Agent(Port(int(sys.argv[1]), "agent"))
    del local.operations["resume"]
    try:
        local.serve()
    except EOFError:
        sys.exit(0)
