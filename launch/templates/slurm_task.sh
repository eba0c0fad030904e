# What SLURM requeues by itself, after a node failed, counts as well.
may_restart() { ((start <= @{restarts})); }
trap 'again 124 "the time limit is near"' USR1

work() {
    # In the background, because a shell minds signals only between commands; a step of its own, so that
    # running out of memory ends the step and not this script.
    @{start} \
        @{python} @{command} &
    wait $!
}
