#!/usr/bin/env bash
# User journeys through both programs, from the user's own files to an exported folder, with the
# commands from the documentation. Prints a line for each journey and stops at the first that fails.
#
#     make test-journeys        # at most 15 minutes on two cores
#
# Needs m2mkd and cliptrans on the PATH. Exported folders are loaded by timm and transformers, with
# torch; if these are not installed, their lines say "skipped".
set -euo pipefail

TOOLS=$(cd "$(dirname "$0")" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cd "$WORK"
export JAX_PLATFORMS=cpu

# journey NAME COMMAND...: runs a function, and prints NAME and its seconds.
journey() {
    local name=$1 start=$SECONDS
    shift
    "$@" >"$WORK/log" 2>&1 &  # set -e would have no effect in the condition of an if
    if ! wait $!; then
        printf '%-60s FAILED after %d s\n' "$name" $((SECONDS - start))
        tail -n 40 "$WORK/log"
        exit 1
    fi
    printf '%-60s %4d s\n' "$name" $((SECONDS - start))
}

# has MODULE...: whether Python has all these modules.
has() {
    python - "$@" <<'PYTHON'
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))
PYTHON
}

make_data() {
    python "$TOOLS/journeys_data.py" "$WORK"
}

SMALL=(--config.data.source=folder --config.data.path=pictures --config.data.test_share=0.2
    --config.data.labels=3
    --config.few_shot.ways=3)

train_on_a_folder() {
    local few=--config.recipes.few_shot.optim.batch=15  # three classes with five images each
    m2mkd check --config=m2mkd/digits.py:phase=pipeline "${SMALL[@]}" $few
    m2mkd train --config=m2mkd/digits.py:phase=pipeline,scale=0.2 --workdir=runs/own "${SMALL[@]}" $few
}

evaluate_it() {
    m2mkd evaluate runs/own | tee out
    grep -q accuracy out
    m2mkd evaluate runs/own/teacher
}

predict_a_picture() {
    m2mkd predict runs/own pictures/two/0.png --json | tee out
    grep -q '"two"' out
    m2mkd features runs/own pictures/one --out features.npz
    test -s features.npz
}

report_while_training() {
    m2mkd train --config=m2mkd/digits.py:phase=pretrain_meta --workdir=runs/watched "${SMALL[@]}" \
        --config.optim.epochs=400 &
    local run=$!
    for _ in $(seq 120); do
        test -s runs/watched/report.html && break
        kill -0 $run
        sleep 1
    done
    test -s runs/watched/report.html
    test ! -e runs/watched/result.json  # it is still training
    kill -TERM $run  # a script's background processes ignore SIGINT
    wait $run
}

resume_with_another_batch() {
    m2mkd train --config=m2mkd/digits.py:phase=end_to_end --workdir=runs/longer "${SMALL[@]}" \
        --config.sources.students="('runs/own/end_to_end',)" --config.optim.batch=32 --config.optim.epochs=3 \
        --config.optim.warmup_epochs=1
    test -s runs/longer/result.json
}

sweep_two_values() {
    m2mkd sweep --config=m2mkd/digits.py:phase=pretrain_meta --workdir=runs/sweep --seeds=2 --jobs=2 \
        --grid='optim.lr=1e-3,2e-3' "${SMALL[@]}" --config.optim.epochs=2 --config.optim.warmup_epochs=1
}

export_to_timm() {
    m2mkd export runs/own/teacher exported/teacher
    python "$TOOLS/journeys_data.py" --timm exported/teacher runs/own/teacher pictures/one/0.png
}

SHOP=(--config.data.source=table --config.data.path=shop/shop.tsv --config.data.target_language=sv
    "--config.languages=('en','sv')" --config.data.train_split=train "--config.data.further_tests=()"
    --config.tokenizer.vocab=320)

train_on_a_table() {
    cliptrans check --config=cliptrans/emoji.py:stage=pipeline "${SHOP[@]}"
    cliptrans train --config=cliptrans/emoji.py:stage=pipeline,scale=0.5 --workdir=runs/shop "${SHOP[@]}"
}

translate_a_file() {
    printf 'red circle\n\nblue square\n' >lines.txt
    cliptrans translate runs/shop --file lines.txt | tee out
    test "$(wc -l <out)" = 3
    test -z "$(sed -n 2p out)"
    cliptrans translate runs/shop "red circle" --pictures shop/red_circle.png --json
}

export_to_transformers() {
    cliptrans export runs/shop exported/shop
    python "$TOOLS/journeys_data.py" --transformers exported/shop
}

journey "make pictures and a table" make_data
journey "m2mkd: train on pictures in folders" train_on_a_folder
journey "m2mkd: evaluate, teacher too" evaluate_it
journey "m2mkd: predict a picture by name, features" predict_a_picture
journey "m2mkd: report.html while training" report_while_training
journey "m2mkd: start from a run, with another batch" resume_with_another_batch
journey "m2mkd: sweep" sweep_two_values
if has torch timm; then
    journey "m2mkd: export, loaded by timm" export_to_timm
else
    echo "m2mkd: export, loaded by timm: skipped, no timm"
fi
journey "cliptrans: train on a TSV with pictures" train_on_a_table
journey "cliptrans: translate a file, and with a picture" translate_a_file
if has torch transformers; then
    journey "cliptrans: export, loaded by transformers" export_to_transformers
else
    echo "cliptrans: export, loaded by transformers: skipped, no transformers"
fi
