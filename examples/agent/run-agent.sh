#!/bin/sh
# run-agent.sh REPOSITORY TASK: let the agent do it, in a machine of its own
exec pytest-microvm run --image agent --user agent --timeout 600 \
  --mount "$1:/code/repository:git" --push agent.py:/opt/agent.py --workdir /code/repository \
  --network "POST https://api.model.example/v1/*" \
  --credential host=api.model.example,env=MODEL_API_KEY,variable=MODEL_API_KEY \
  --host "api.model.example=$MODEL_ADDRESS" \
  --record record -- python3 /opt/agent.py "$2"
