// A canvas between noise and text: every position coloured by its entropy, its token shown once it is accepted.
import { useState } from "preact/hooks";

const BOUNDS = [0.05, 0.3, 1, 2, 4]; // nats; one colour below each and one above
const shade = (entropy) => BOUNDS.findIndex((bound) => entropy < bound) + 1 || BOUNDS.length + 1;
const mean = (values) => values.reduce((sum, each) => sum + each, 0) / Math.max(values.length, 1);

// The noise behind the reply's end is not worth a line of its own: it is cut where no draft position is text.
function shown(draft) {
  let end = draft.tokens.length;
  while (end > 0 && draft.tokens[end - 1] === null) end -= 1;
  return Math.min(draft.tokens.length, end + 1);
}

function Positions({ draft }) {
  const accepted = new Set(draft.accepted);
  return (
    <div class="canvas" aria-hidden="true">
      {draft.tokens.slice(0, shown(draft)).map((token, place) => {
        const known = accepted.has(place);
        const kind = token === null ? "control" : known ? "known" : "noise";
        return (
          <span key={place} class={`${kind} e${shade(draft.entropy[place])}`}>
            {token === null ? "◦" : known || token.trim() ? token : "·"}
          </span>
        );
      })}
    </div>
  );
}

function Plot({ drafts, at }) {
  const means = drafts.map((each) => mean(each.entropy));
  const top = Math.max(...means, 0.1);
  const x = (index) => (drafts.length > 1 ? (index / (drafts.length - 1)) * 196 + 2 : 100);
  const y = (value) => 38 - (value / top) * 34;
  const begins = drafts.flatMap((each, index) => (index > 0 && each.canvas !== drafts[index - 1].canvas ? [index] : []));
  return (
    <svg class="plot" viewBox="0 0 200 40" preserveAspectRatio="none" role="img"
      aria-label={`Mean entropy by step, from ${means[0].toFixed(2)} to ${means.at(-1).toFixed(2)} nats`}>
      {begins.map((index) => <line key={index} class="begin" x1={x(index - 0.5)} x2={x(index - 0.5)} y1="0" y2="40" />)}
      <polyline points={means.map((value, index) => `${x(index)},${y(value)}`).join(" ")} />
      <line class="now" x1={x(at)} x2={x(at)} y1="0" y2="40" />
    </svg>
  );
}

export function Facts({ facts }) {
  if (!facts) return null;
  const told = [
    [facts.canvases, facts.canvases === 1 ? "canvas" : "canvases"],
    [facts.steps, "steps"],
    [facts.tokens_per_forward?.toFixed(1), "tokens per forward"],
    [facts.tokens_per_second?.toFixed(0), "tokens/s"],
    [facts.time_to_first_text_ms?.toFixed(0), "ms to first text"],
  ].filter(([value]) => value !== undefined && value !== null);
  return (
    <ul class="facts" aria-label="How the reply was made">
      {told.map(([value, name]) => <li key={name}><b>{value}</b> {name}</li>)}
    </ul>
  );
}

// While the reply comes, the last step; afterwards a slider through all of them.
export function Denoising({ drafts, live }) {
  const [chosen, choose] = useState(null);
  const [open, setOpen] = useState(false);
  if (!drafts.length) return null;
  const at = live || chosen === null ? drafts.length - 1 : Math.min(chosen, drafts.length - 1);
  const draft = drafts[at];
  if (!live && !open) {
    return <button class="quiet" onClick={() => { setOpen(true); choose(0); }}>▦ Replay {drafts.length} steps</button>;
  }
  const where = `Canvas ${draft.canvas + 1}, step ${draft.step}`;
  return (
    <section class="denoising" aria-label="Denoising" data-step={at}>
      <header>
        <span>{where}</span>
        <span class="dim">{draft.accepted.length} of {draft.tokens.length} accepted · mean entropy {mean(draft.entropy).toFixed(2)} nats</span>
        {!live && <button class="quiet" onClick={() => setOpen(false)}>Hide</button>}
      </header>
      <Positions draft={draft} />
      <footer>
        <Plot drafts={drafts} at={at} />
        {!live && (
          <input type="range" min="0" max={drafts.length - 1} value={at} aria-label="Step" aria-valuetext={where}
            onInput={(event) => choose(Number(event.target.value))} />
        )}
        <span class="legend" aria-hidden="true">sure {[1, 2, 3, 4, 5, 6].map((each) => <i key={each} class={`e${each}`} />)} unsure</span>
      </footer>
    </section>
  );
}
