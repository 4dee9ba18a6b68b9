"""Trains the runs of a study, several at a time or as jobs of Slurm, for `tools/sweep.py`.

study_file.py       the YAML file of a study, and its runs
foresee.py          what each run costs, and why it cannot start
ladder.py           learning rates that are fitted on a ladder
launch.py           a training command as a process, and its progress
one_run.py          the folder, state, command, start and failure of a run
sweep.py            starts the runs on this machine, resumes them, stops them
slurm_job.py        trains one run in a job of Slurm
slurm.py            submits the runs to Slurm as job arrays, and stops the jobs
text_bytes.py       losses in bits per byte of text
result_tables.py    the results as CSV and Parquet
terminal_tables.py  forecasts and states as text
"""
