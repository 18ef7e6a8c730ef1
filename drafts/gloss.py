import re
p="docs/glossary.md"; s=open(p).read()
new={
"AUC":("曲线下面积（AUC）","The probability that a model gives a late flight a higher score than one that is not late; 0.5 is guessing, 1 is perfect."),
"bagging":("自助聚合（装袋法）","Training each member of an ensemble on rows drawn with replacement, and taking the mean of their predictions."),
"cross-validation":("交叉验证","Cutting the rows into parts and holding out each of them once, so that every row is used for testing."),
"hyper-parameter":("超参数","A number that is chosen before training and not learnt, such as the learning rate."),
"list scheduling":("列表调度","One queue of tasks: whoever is free takes the next."),
"over-subscription":("过度订阅","More threads that want to compute than there are cores; they take turns and wait for each other."),
"retry":("重试","Running a task again that has failed."),
"successive halving":("逐次减半","Training many configurations a little, keeping the best share, training those longer, and so on."),
"work stealing":("工作窃取","A worker without tasks takes some that wait at another one."),
}
head,*parts=re.split(r"^### ",s,flags=re.M); entries={re.match(r"[^\n]*",x)[0]:x for x in parts}
for k,(zh,en) in new.items():
    if k.lower() in {e.lower() for e in entries}: print("there:",k); continue
    entries[k]=f"{k}\n\n**{zh}** · {en}\n\n"
names=list(entries); order=sorted(names,key=str.lower)
old=[n for n in names if n not in new]; print("sorted before:", old==sorted(old,key=str.lower))
if __name__=="__main__":
    import sys
    if "write" in sys.argv:
        # insert each before the first entry that comes after it
        seq=[n for n in names if n in old or n not in new]
        for k in sorted(set(entries)-set(seq),key=str.lower):
            at=next((i for i,n in enumerate(seq) if n.lower()>k.lower()),len(seq)); seq.insert(at,k)
        body=head+"".join("### "+entries[n].rstrip("\n")+"\n\n" for n in seq)
        open(p,"w").write(body.rstrip("\n")+"\n")
