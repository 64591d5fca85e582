"""The short form of a page: what is folded points to the page, and text stays text."""

from __future__ import annotations

from rayalign.report.markdown import page_markdown

PAGE = """<html><head><title>t</title></head><body>
<header><h1>Cells &amp; seeds</h1><nav data-page-only><a href="#a">A</a></nav></header>
<main><section>
<h2>Table</h2>
<p>One
line with <em>words</em>, <code>a: [1]</code>, <code>a|`b`</code> and &lt;b&gt; [x](y).</p>
<div><table>
<thead><tr class="groups"><td></td><th colspan="2">mean of 6 prompts</th></tr>
<tr><th><button>method</button></th><th><button>score</button><small>share</small></th></tr></thead>
<tbody>
<tr><th><span class="key">●</span>dpo<small>off-policy</small></th><td>0.5<small>[0.4, 0.6]</small></td></tr>
</tbody>
</table></div>
<details open><summary>open <small>set</small></summary><p>seen</p></details>
<details><summary>closed</summary><p>unseen</p></details>
<details open data-folded><summary>wide</summary><p>unseen</p></details>
<figure data-stem="curve-loss"></figure>
<dl><dt>torch</dt><dd>2.13</dd></dl>
<ul><li><div>dpo</div><pre># one

two</pre></li></ul>
</section></main>
<script>x</script>
</body></html>"""
EXPECTED = """# Cells &amp; seeds

## Table

One line with *words*, `a: [1]`, a\\|\\`b\\` and &lt;b&gt; [x\\](y).

mean of 6 prompts

| method | score (share) |
| --- | --- |
| dpo (off-policy) | 0.5 [0.4, 0.6] |

**open set**

seen

*closed*: in [report.html](report.html)

*wide*: in [report.html](report.html)

![curve loss](curve-loss.svg)

- **torch**: 2.13

- dpo

      # one
      
      two
"""


def test_a_page_in_short() -> None:
    assert page_markdown(PAGE) == EXPECTED
