# shellcheck shell=bash disable=SC2034
# LLaMA3-8B to 128k: what its job scripts share. Training has the same in conf/experiment/llama3_8b_128k.yaml.
EXPERIMENT=llama3_8b_128k
EXTENSION=(model=llama3_8b target_len=131072 run.name="$EXPERIMENT")
SEQUENCE_RANKS=8
