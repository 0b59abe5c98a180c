// One message: what was said, how it came about, and what can be done with it.
import { useMemo, useRef, useState } from "preact/hooks";
import { Denoising, Facts } from "./canvas.jsx";
import { draftsOf } from "./drafts.js";
import { html } from "./markdown.js";
import { edit, giveResult, retry, running } from "./talk.js";

function Copy({ text }) {
  const [done, setDone] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setDone(true);
    setTimeout(() => setDone(false), 1500);
  };
  return <button class="quiet" onClick={copy}>{done ? "Copied" : "Copy"}</button>;
}

function Call({ call, messages, busy }) {
  const [text, setText] = useState("");
  const result = messages.find((each) => each.tool_call_id === call.id);
  let given = call.arguments;
  try {
    given = JSON.stringify(JSON.parse(call.arguments), null, 2);
  } catch {
    // shown as it came
  }
  return (
    <div class="call">
      <div><span class="dim">calls</span> <code>{call.name}</code></div>
      <pre tabindex="0" aria-label="Arguments">{given}</pre>
      {result ? <><div class="dim">result</div><pre tabindex="0" aria-label="Result">{result.content}</pre></> : (
        <form onSubmit={(event) => { event.preventDefault(); giveResult(call.id, text); }}>
          <input aria-label={`Result of ${call.name}`} placeholder="What the tool found" value={text} onInput={(event) => setText(event.target.value)} />
          <button disabled={busy}>Give result</button>
        </form>
      )}
    </div>
  );
}

export function Images({ urls = [], drop }) {
  if (!urls.length) return null;
  return (
    <ul class="images" aria-label="Images">
      {urls.map((url, index) => (
        <li key={index}>
          <img src={url} alt={`Image ${index + 1}`} />
          {drop && <button type="button" class="quiet" aria-label={`Remove image ${index + 1}`} onClick={() => drop(index)}>×</button>}
        </li>
      ))}
    </ul>
  );
}

function Asked({ message, busy }) {
  const [editing, setEditing] = useState(false);
  const field = useRef();
  if (editing) {
    const save = (event) => {
      event.preventDefault();
      setEditing(false);
      edit(message.id, field.current.value);
    };
    return (
      <form class="editing" onSubmit={save}>
        <textarea ref={field} aria-label="Edit message" rows="4" autofocus>{message.content}</textarea>
        <div class="actions"><button class="strong" disabled={busy}>Send again</button><button type="button" onClick={() => setEditing(false)}>Cancel</button></div>
      </form>
    );
  }
  return (
    <>
      <Images urls={message.images} />
      {message.content && <div class="bubble">{message.content}</div>}
      <div class="actions"><button class="quiet" disabled={busy} onClick={() => setEditing(true)}>Edit</button><Copy text={message.content} /></div>
    </>
  );
}

function Answer({ message, messages, live, busy }) {
  const drafts = draftsOf(message.id).value;
  const written = useMemo(() => html(message.content), [message.content]); // not anew for every step
  return (
    <>
      {message.reasoning && <details class="thought"><summary>Thinking</summary><div>{message.reasoning}</div></details>}
      {message.content && <div class="prose" dangerouslySetInnerHTML={{ __html: written }} />}
      {message.calls?.map((call) => <Call key={call.id} call={call} messages={messages} busy={busy} />)}
      {live && !drafts.length && !message.content && <p class="dim">Reading …</p>}
      {message.error && <p class="fault" role="alert">{message.error}</p>}
      {message.stopped && <p class="dim">Stopped.</p>}
      {message.finish === "length" && <p class="dim">Cut off: out of room.</p>}
      <Denoising drafts={drafts} live={live} />
      {!live && <Facts facts={message.facts} />}
      {!live && (
        <div class="actions">
          <button class="quiet" disabled={busy} onClick={() => retry(message.id)}>Retry</button>
          {message.content && <Copy text={message.content} />}
        </div>
      )}
    </>
  );
}

export function Message({ message, messages }) {
  if (message.role === "tool") return null; // shown with its call
  const busy = running.value !== null;
  const live = running.value?.message === message.id;
  return (
    <article class={message.role} aria-label={message.role === "user" ? "You" : "Reply"} aria-busy={live}>
      {message.role === "user" ? <Asked message={message} busy={busy} /> : <Answer message={message} messages={messages} live={live} busy={busy} />}
    </article>
  );
}
