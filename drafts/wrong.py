import io, contextlib
from helpers.classroom.checks import check
from tests.wrong_answers.nb07 import WRONG
for ex, cases in WRONG.items():
    said=set()
    for i,(a,w) in enumerate(cases,1):
        f=io.StringIO()
        with contextlib.redirect_stdout(f): check(ex,a)
        v=f.getvalue().strip(); 
        if w not in v or v in said or "not yet" not in v: print("BAD",ex,i,repr(w),v)
        said.add(v)
