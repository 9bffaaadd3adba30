"""Jobs of many processes: torchrun here, a node's agent under Slurm, the attempts of a job."""
