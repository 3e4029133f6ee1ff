"""The page's modules that read what a server sends, in the browser that runs them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra server")

pytest_plugins = ["page_fixtures"]


def test_events_are_read_however_the_stream_is_cut(page: Any) -> None:
    text = ': hello\r\nevent: step\r\ndata: {"a":1}\r\n\r\ndata: one\ndata:two ö\n\ndata\n\n'
    text += "id: 3\revent: x\rdata: y\r\rdata: cut"
    code = """async ([text, size]) => {
      const { events } = await import('/page/sse.js');
      const bytes = new TextEncoder().encode(text);
      const stream = new ReadableStream({ start(controller) {
        for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
        controller.close();
      }});
      const found = [];
      for await (const { event, data } of events(stream)) found.push([event, data]);
      return found;
    }"""
    expected = [["step", '{"a":1}'], ["message", "one\ntwo ö"], ["message", ""], ["x", "y"]]
    for size in (1, 2, 3, 7, 1000):
        assert page.evaluate(code, [text, size]) == expected


def test_counters_are_read_as_prometheus_writes_them(page: Any) -> None:
    text = (
        '# HELP a_total A \\"b\\".\n# TYPE a_total counter\na_total{x="1 }",y="q\\"\\n"} 2\na_total{x="2",y=""} 3.5e1\n'
        "# HELP a_created A.\n# TYPE a_created gauge\na_created 1e9\n"
        '# HELP s Seconds\n# TYPE s histogram\ns_bucket{le="0.1"} 1\ns_bucket{le="+Inf"} 4\ns_count 4\ns_sum 2\n'
        "# HELP python_info P\n# TYPE python_info gauge\npython_info 1\n"
    )
    code = """async (text) => {
      const { families, total } = await import('/page/metrics.js');
      return families(text).map((f) => [f.name, f.type, f.samples[0].labels, total(f)]);
    }"""
    assert page.evaluate(code, text) == [
        ["a_total", "counter", {"x": "1 }", "y": 'q"\n'}, {"value": 37}],
        ["s", "histogram", {"le": "0.1"}, {"value": 4, "mean": 0.5}],
    ]
