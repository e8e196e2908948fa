"""The IDE's configuration in the how-to guide fits the code and the command beside it."""

import json
import re

from support.debug_adapter import HOW_TO, files_of_the_how_to


def test_launch_configuration_fits_the_guide():
    files = files_of_the_how_to()
    launch = json.loads(files[".vscode/launch.json"])
    (configuration,) = launch["configurations"]
    (port,) = re.findall(r"debugpy\.listen\((\d+)\)", files["debugging.py"])
    (option,) = re.findall(r"--microvm-debug-port=(\d+)", HOW_TO.read_text())
    assert configuration["connect"] == {"host": "localhost", "port": int(port)}
    assert option == port
    assert (configuration["type"], configuration["request"]) == ("debugpy", "attach")
    assert configuration["pathMappings"] == [
        {"localRoot": "${workspaceFolder}", "remoteRoot": "${workspaceFolder}"}
    ]
