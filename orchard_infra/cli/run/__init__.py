"""`orchard-infra run`: any command under the lock of a project.

* `command`: the options and the exit statuses
* `protected`: one command in a `Session`, and the report
* `supervisor`: starts the command, waits for it, passes signals on
* `reaper`: what outlives the command; `bystanders`: what of that is none of its own
* `witness`, `terminal`, `oom`: who else got a signal; the terminal's modes; the OOM killer
* `waiting`: what a person sees while the lock is taken
"""
