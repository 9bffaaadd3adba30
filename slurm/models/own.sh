# shellcheck shell=bash disable=SC2034
# A model of your own: what its job scripts need stands in the experiment that launch.init wrote, given as experiment=NAME.
EXPERIMENT=own
EXTENSION=()
