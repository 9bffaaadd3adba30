# shellcheck shell=bash disable=SC2034
# Phi3-mini to 128k: what its job scripts share. Training has the same in conf/experiment/phi3_mini_128k.yaml.
EXPERIMENT=phi3_mini_128k
EXTENSION=(model=phi3_mini target_len=131072 run.name="$EXPERIMENT")
SEQUENCE_RANKS=8
