// What the server is at, asked once a second while anybody looks.
import { useEffect, useState } from "preact/hooks";
import * as api from "./api.js";
import { apiKey } from "./store.js";

const KEPT = 120; // seconds that are drawn

function Line({ values, label, unit }) {
  const top = Math.max(...values, 1);
  const points = values.map((value, index) => `${((KEPT - values.length + index) / (KEPT - 1)) * 300},${58 - (value / top) * 54}`);
  return (
    <figure>
      <figcaption>{label} <b>{values.at(-1) ?? "–"}</b> {unit}</figcaption>
      <svg class="plot" viewBox="0 0 300 60" preserveAspectRatio="none" role="img" aria-label={`${label} over the last two minutes, at most ${top} ${unit}`}>
        <polyline points={points.join(" ")} />
      </svg>
    </figure>
  );
}

function Pages({ kind, pages }) {
  const share = (count) => (100 * count) / Math.max(pages.total, 1);
  return (
    <figure>
      <figcaption>Cache, {kind} layers <b>{pages.held}</b> held, <b>{pages.kept}</b> kept, {pages.free} free of {pages.total} pages</figcaption>
      <svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" role="img" aria-label={`${pages.held} pages held, ${pages.kept} kept, of ${pages.total}`}>
        <rect class="held" x="0" width={share(pages.held)} height="4" />
        <rect class="kept" x={share(pages.held)} width={share(pages.kept)} height="4" />
      </svg>
    </figure>
  );
}

const number = (value, digits = 0) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits }));
const percent = (value) => (value === null || value === undefined ? "–" : `${number(100 * value, 1)} %`);

function table(now) {
  return [
    ["Requests at a time", number(now.slots)],
    ["Replies ended", number(Object.values(now.requests).reduce((sum, each) => sum + each, 0))],
    ["Dropped by their client", number(now.cancellations)],
    ["Tokens written", number(now.completion_tokens)],
    ["Tokens per forward", number(now.tokens_per_forward, 1)],
    ["Steps per canvas", number(now.steps_per_canvas, 1)],
    ["Seconds per canvas", number(now.canvas_seconds, 3)],
    ["Seconds to first text", number(now.time_to_first_text_seconds, 3)],
    ["Prompt tokens", number(now.cache.prompt_tokens)],
    ["Of them found in the cache", percent(now.cache.hit_rate)],
    ["Up for", `${number(now.uptime_seconds / 60, 1)} min`],
    ...(now.gpu_memory ? [["GPU memory", `${number(now.gpu_memory.used_bytes / 1e9, 1)} of ${number(now.gpu_memory.total_bytes / 1e9, 1)} GB`]] : []),
  ];
}

export function Stats() {
  const [history, setHistory] = useState([]);
  const [fault, setFault] = useState(null);
  useEffect(() => {
    const look = async () => {
      if (document.hidden) return;
      try {
        const now = await api.stats();
        setHistory((before) => [...before.slice(1 - KEPT), now]);
        setFault(null);
      } catch (error) {
        setFault(error);
      }
    };
    look();
    const timer = setInterval(look, 1000);
    return () => clearInterval(timer);
  }, []);
  const now = history.at(-1);
  const over = (name) => history.map((each) => each[name]);
  return (
    <div class="stats">
      <header class="bar"><h1>easel</h1><span class="dim model">{now?.model ?? ""}</span><a href="/">Chat</a></header>
      <main>
        <h2>Server statistics</h2>
        {fault && <p class="banner" role="alert">{fault.message}</p>}
        {fault?.status === 401 && <label>API key <input type="password" autocomplete="off" onChange={(event) => (apiKey.value = event.target.value.trim())} /></label>}
        {now && (
          <>
            <div class="figures">
              <Line values={over("tokens_per_second")} label="Speed" unit="tokens/s" />
              <Line values={over("running")} label="Running" unit="requests" />
              <Line values={over("waiting")} label="Waiting" unit="requests" />
            </div>
            {Object.entries(now.pages).map(([kind, pages]) => <Pages key={kind} kind={kind} pages={pages} />)}
            <dl>{table(now).map(([name, value]) => <div key={name}><dt>{name}</dt><dd>{value}</dd></div>)}</dl>
          </>
        )}
      </main>
    </div>
  );
}
