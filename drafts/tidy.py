import re, sys, textwrap
def strings(m):
    name=m[1]; parts=re.findall(r'"((?:[^"\\]|\\.)*)"', m[2]); text="".join(parts)
    first=100-4-len(name)-2-1; lines=textwrap.wrap(text, width=92-0, initial_indent=" "*(len(name)+1), break_long_words=False, break_on_hyphens=False)
    lines=[l.strip() for l in lines]
    out=[]
    for i,l in enumerate(lines):
        t=l+(" " if i<len(lines)-1 else "")
        out.append(("    %s="%name if i==0 else "    ")+'"%s"'%t)
    return "\n".join(out)+","
def code(body):
    return re.sub(r'^    (caption|alt)=((?:"(?:[^"\\]|\\.)*"\s*)+),', strings, body, flags=re.M)
def md(body):
    out=[]; fence=False
    for block in re.split(r"(\n\s*\n)", body):
        if re.match(r"\n\s*\n$",block): out.append(block); continue
        if block.count("```")%2: fence=not fence; out.append(block); continue
        if fence or "```" in block or "$$" in block or re.match(r"\s*(\||#|<|\\)",block): out.append(block); continue
        items=re.split(r"\n(?=- )", block)
        new=[]
        for it in items:
            ind="  " if it.startswith("- ") else ""
            if "Sources" in it or " ·\n" in it: new.append(it); continue
            new.append("\n".join(textwrap.wrap(" ".join(it.split()), width=110, subsequent_indent=ind, break_long_words=False, break_on_hyphens=False)))
        out.append("\n".join(new))
    return "".join(out).rstrip("\n") + "\n"
for p in sys.argv[1:]:
    s=open(p).read(); parts=re.split(r"^(%% (?:md|code)[^\n]*\n)", s, flags=re.M); res=[parts[0]]
    for h,b in zip(parts[1::2],parts[2::2]): res+= [h, code(b) if h.startswith("%% code") else md(b)]
    open(p,"w").write("".join(res))
