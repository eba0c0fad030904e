# Starts that failed one after another without getting further: none finished a checkpoint, a shard or an export.
# The file holds their number, and by its time the beginning of this start.
tries=@{tries}-$job.tries
[[ -s $tries ]] || echo 0 >"$tries"
touch "$tries"

got_further() {
    [[ $(find @{made_in} '(' -name complete.json -o -name '*.parquet' ')' -newer "$tries" -print -quit 2>/dev/null) ]]
}

may_restart() {
    local failed
    failed=$(got_further && echo 0 || cat "$tries")
    echo $((failed + 1)) >"$tries"
    ((failed < @{restarts}))
}

torchruns=

# Before the time limit, and where SLURM is set to say so before it preempts, this script is told, and it alone: it tells all processes of
# all nodes. The ranks save together and leave; torchrun waits for them and does not start them again. A start that finished nothing
# counts as failed: a stage that needs longer than its time limit to get anywhere would go back into the queue for ever.
leave() {
    local left
    trap - ERR
    trap '' USR1
    tell "told to leave, saving"
    scancel --signal=USR1 "$SLURM_JOB_ID" || true
    for ((left = @{saving}; left > 0; left--)); do
        kill -0 "$torchruns" 2>/dev/null || break
        sleep 1
    done
    if got_further; then
        echo 0 >"$tries"
    elif ! may_restart; then
        tell "told to leave, and nothing was finished in $(cat "$tries") starts: given up"
        exit 75
    fi
    requeue "told to leave"
    exit 75
}
trap leave USR1

work() {
    local head address
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    head=${head%%$'\n'*}
    address=$(scontrol --oneliner show node "$head" | sed -E 's/.* NodeAddr=([^ ]*) .*/\1/')
    # Agents count restarts each for itself: in a store that they share, ranks of unlike counts would never meet again after one has died.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # In the background, because a shell minds signals only between commands.
    @{start} \
        @{python} torch.distributed.run --nnodes=@{nodes} --nproc-per-node=@{processes} \
        --rdzv-backend=c10d --rdzv-id="$job-$start" --rdzv-endpoint="$address:$((10000 + SLURM_JOB_ID % 20000))" \
        --max-restarts=@{max_restarts} --signals-to-handle=@{signals} --shutdown-timeout=@{saving} \
        --no-python @{python} @{command} &
    torchruns=$!
    wait "$torchruns"
}
