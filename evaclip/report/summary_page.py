"""The template of the page that `evaclip report` fills."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Scores below {{ folder }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1d2126 }
  h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } h3 { font-size: 1rem; margin-top: 1.6rem }
  .wide { overflow-x: auto } table { border-collapse: collapse }
  td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top }
  th { border-bottom: 1px solid #c8ccd1 } td.number { text-align: right; font-variant-numeric: tabular-nums }
  .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem }
  .plots img { max-width: 100%; height: auto } .quiet { color: #666c74; font-size: 12px }
</style>
<h1>Scores</h1>
<p class="quiet">{{ "{:,}".format(count) }} results below {{ folder }}; of each run the last step is in the table</p>
<div class="wide"><table>
<tr><th>model{% for title in titles %}<th>{{ title }}{% endfor %}
<th>mean of 6<th>robustness gap<th>mean of 12</tr>
{% for row in rows %}
<tr><td>{{ row.name }}{% if row.step is not none %}, step {{ "{:,}".format(row.step) }}{% endif %}
<br><span class="quiet">{{ row.place }}</span>
{% for cell in row.cells %}<td class="number">{% if cell %}{{ "%.2f"|format(100 * cell.value) }}
{% if cell.interval %}<br><span class="quiet">{{ "%.2f"|format(100 * cell.interval[0]) }} to
{{ "%.2f"|format(100 * cell.interval[1]) }}</span>{% endif %}
<br><span class="quiet">{{ cell.metric }}{% if cell.partial %}, partial data{% endif %}</span>{% endif %}
{% endfor %}
{% for value in (row.mean6, row.gap, row.mean12) %}
<td class="number">{% if value is not none %}{{ "%.2f"|format(100 * value) }}{% endif %}{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="quiet">Below a score its 95 % interval (Wilson). The mean of 6 is over ImageNet, -V2, -A, -R, -Sketch and
ObjectNet; the robustness gap is ImageNet minus that mean (arXiv 2303.15389). Means are given only where every benchmark
of them is there and whole.</p>
{% if trends %}
<h2>By step</h2>
<div class="plots">
{% for trend in trends %}<div><img alt="{{ trend.title }}" src="data:image/png;base64,{{ trend.data }}">
<br><span class="quiet">{{ trend.place }}</span></div>{% endfor %}
</div>
{% endif %}
{% if confusions %}
<h2>Taken for each other</h2>
{% for confusion in confusions %}
<h3>{{ confusion.title }}: {{ confusion.model }}{% if confusion.step is not none %},
step {{ "{:,}".format(confusion.step) }}{% endif %}</h3>
<table>
<tr><th>is<th>taken for<th>images<th>of</tr>
{% for pair in confusion.pairs %}
<tr><td>{{ pair.true }}<td>{{ pair.said }}<td class="number">{{ "{:,}".format(pair.count) }}
<td class="number">{{ "{:,}".format(pair.images) }}
<td>{% for picture in pair.pictures %}<img alt="{{ pair.true }} taken for {{ pair.said }}"
src="data:image/png;base64,{{ picture }}"> {% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% endif %}
</html>
"""
