#!/usr/bin/env bash
# Every figure of README.md and results/README.md, from the data to the tables.
#
#     results/all.sh CHEST_XRAY [NIH [ROOT]]
#     SEEDS="0 1 2" JOBS=1 results/all.sh CHEST_XRAY
#
# CHEST_XRAY  Kermany et al. as downloaded: train/NORMAL, train/PNEUMONIA, test/NORMAL, ...
# NIH         folder of ChestX-ray14: images in any subfolder, Data_Entry_2017.csv,
#             BBox_List_2017.csv; without it the tables of boxes are left out
# ROOT        folder for runs, logs and tables.md (default: evidence)
# SEEDS       of AFiRe, category loss only and MAE (default: 0 to 4); the others take the first three
# JOBS        runs at a time (default: 2), each on one core; ROOT/logs has what they print
#
# Start it again to go on after a stop: what has its results is skipped, with the same code and data
# only. A run that failed is named at the end, and the tables have what is there.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -d "$1/train" ] || [ ! -d "$1/test" ]; then
    echo "all.sh: name the folder of Kermany's set, which has train and test in it" >&2
    exit 2
fi
export OMP_NUM_THREADS=1
export PYTHON=${PYTHON:-python}
export CODE=$(cd "$(dirname "$0")/.." && pwd)
export KERMANY=$(cd "$1" && pwd)
export NIH=${2:+$(cd "$2" && pwd)}
SEEDS=${SEEDS:-0 1 2 3 4}
export THREE=$(echo $SEEDS | cut -d " " -f 1-3)
mkdir -p "${3:-evidence}/logs" "${3:-evidence}/runs"
cd "${3:-evidence}"
made_by="$(cd "$CODE" && cat afire.py results/{mae,crops,probes,locate,boxes,finetune,tokens}.py \
    results/{shift,runs}.py data/make_table.py | cksum) $KERMANY $NIH"
if [ -e made_by ] && [ "$(cat made_by)" != "$made_by" ]; then
    echo "all.sh: $PWD has results of other code or other data: remove it, or name another ROOT" >&2
    exit 2
fi
echo "$made_by" > made_by

# What each run trains, best first: NAME SCRIPT OPTIONS. MAE takes as long as AFiRe.
list_runs() {
    for seed in $SEEDS; do
        echo "afire-$seed afire.py --seed $seed"
        echo "mae-$seed results/mae.py --epochs 103 --lr 24e-3 --seed $seed"
        echo "category-$seed afire.py --structure-weight 0 --restoration-weight 0 --seed $seed"
        [[ " $THREE " == *" $seed "* ]] || continue
        echo "lesions-$seed afire.py --category-weight 0 --seed $seed"
        echo "crops-$seed results/crops.py --seed $seed"
        echo "structure-$seed afire.py --category-weight 0 --restoration-weight 0 --seed $seed"
        echo "restoration-$seed afire.py --structure-weight 0 --category-weight 0 --seed $seed"
        echo "phantoms-$seed afire.py --seed $seed"
    done
    # The tuning of MAE, as AFiRe's on held-out patients and reframed images of theirs: first its
    # mask ratio, then its learning rate; mae-0 has three times that of AFiRe.
    echo "mae-r50 results/mae.py --mask-ratio .5 --epochs 83"
    echo "mae-r75 results/mae.py --epochs 103"
    echo "mae-r90 results/mae.py --mask-ratio .9 --epochs 113"
    echo "mae-lr-low results/mae.py --epochs 103 --lr 2.67e-3"
    echo "afire-128-0 afire.py --img-size 128 --patch-size 8"
    echo "mae-128-0 results/mae.py --img-size 128 --patch-size 8 --epochs 103 --lr 24e-3"
}

# make FILE COMMAND: runs the command unless the file is there; CODE/ stands before the script.
make() {
    [ -e "$1" ] || "$PYTHON" "$CODE/$2" "${@:3}"
}

# A run and its results: NAME SCRIPT OPTIONS.
job() {
    local name=$1 run=runs/$1 script=$2
    local trained_only=--trained-only                      # untrained networks: by AFiRe's runs
    [[ $name != afire* && $name != phantoms* ]] || trained_only=
    shift 2
    if [[ $name == phantoms* ]]; then
        make "$run/encoder.pth" "$script" pretrain --out "$run" --preset phantoms "$@"
        make "$run/locate/locate.npz" results/locate.py "$run"
        return
    fi
    make "$run/encoder.pth" "$script" pretrain --data "$KERMANY/train" --labels people.csv \
        --preset small --out "$run" "$@"
    make "$run/eval/metrics.json" afire.py eval --ckpt "$run"
    make "$run/eval/probes.npz" results/probes.py "$run" $trained_only
    local part data labels parts="shifted published"
    [[ $name != mae-r?? && $name != mae-lr-* ]] || parts=shifted           # of the tuning
    for part in $parts; do
        data=$([ $part = published ] && echo "$KERMANY" || echo shifted)
        labels=$([ $part = published ] && echo published.csv || echo shifted/labels.csv)
        make "$run/$part/metrics.json" afire.py eval --ckpt "$run" --data "$data" \
            --labels "$labels" --out "$run/$part"
        make "$run/$part/probes.npz" results/probes.py "$run" $trained_only --data "$data" \
            --labels "$labels" --into $part
    done
    [ "$parts" != shifted ] || return 0
    make "$run/cohesion.json" results/tokens.py "$run" --no-picture
    make "$run/locate/locate.npz" results/locate.py "$run" $trained_only
    if [[ " $THREE " == *" ${name##*-} "* ]]; then
        make "$run/finetune/predictions.npz" results/finetune.py "$run" --fractions 10% \
            --repeats 2
    fi
    if [ -n "$NIH" ]; then
        make "$run/boxes/boxes.npz" results/boxes.py --ckpt "$run" --data nih \
            --labels "$CODE/results/nih.csv" --out "$run/boxes"
    fi
}

# A job's output goes to its log, and its name to stdout if it fails.
logged() {
    bash -ec 'job "$@"' job "$@" > "logs/$1.log" 2>&1 || echo "$1 failed: see $PWD/logs/$1.log"
}
export -f make job logged

# The data: a fixed fifth of the patients held out; the published split; reframed; adults with boxes
[ -e published.csv ] || {
    "$PYTHON" "$CODE/data/make_table.py" kermany "$KERMANY/train" > people.csv
    "$PYTHON" "$CODE/data/make_table.py" kermany "$KERMANY" > published.partial
    mv published.partial published.csv
}
[ -e shifted/labels.csv ] || rm -rf shifted               # half of it, after a stop
make shifted/labels.csv results/shift.py --data "$KERMANY/train" --labels people.csv --out shifted
if [ -n "$NIH" ] && [ ! -e nih.csv ]; then
    mkdir -p nih
    find -L "$NIH" -name "*_*.png" | grep -F -f <(cut -d , -f 1 "$CODE/results/nih.csv" | sed 1d) |
        xargs -I {} ln -sf {} nih/
    "$PYTHON" "$CODE/data/make_table.py" nih "$NIH" --data nih --masks nih/masks > nih.partial
    mv nih.partial nih.csv
fi

list_runs | xargs -P "${JOBS:-2}" -I {} bash -c 'logged {}'
"$PYTHON" "$CODE/results/tables.py" collect .
"$PYTHON" "$CODE/results/tables.py" > tables.md
echo "in $PWD: tables.md, from $CODE/results/scores.npz"
