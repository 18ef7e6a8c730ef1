"""piece.py SEED RATE FIRST LAST: some trials of the study."""
import sys, os, pandas as pd, numpy as np, time
from threadpoolctl import threadpool_limits
threadpool_limits(1)
sys.path.insert(0, "/tmp/x/n7")
import search_study as S
seed, rate, a, b = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
out=f"/tmp/n7/p-{seed}-{rate}-{a:02}.pkl"
if os.path.exists(out): sys.exit()
t=time.time(); train, valid, test = S._data(); rows=[]
for trial, config in enumerate(S.draw(S.SPACE, S.TRIALS, seed)):
    if a <= trial < b:
        for n, net, w in S._trainings(rate, config, train, seed):
            with np.errstate(all="ignore"):
                rows.append(dict(rate=rate, seed=seed, trial=trial, samples=n, valid_loss=net.loss_at(w,*valid), test_loss=net.loss_at(w,*test)))
pd.DataFrame(rows).to_pickle(out); print(out, round(time.time()-t,1), flush=True)
