// How replies are asked for, and what the page looks like.
import { useEffect, useRef } from "preact/hooks";
import { apiKey, begin, change, conversation, settings } from "./store.js";
import { connect, needsKey } from "./talk.js";

const PRESETS = { quality: "Quality: more steps, surer", balanced: "Balanced: as the model says", fast: "Fast: fewer steps" };

function validTools(text) {
  if (!text.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : "A list of tools is needed: [ … ]";
  } catch (error) {
    return error.message;
  }
}

export function Settings({ close }) {
  const dialog = useRef();
  useEffect(() => dialog.current.showModal(), []);
  const now = settings.value;
  const set = (name) => (event) => {
    const { type, checked, value } = event.target;
    settings.value = { ...settings.value, [name]: type === "checkbox" ? checked : value };
  };
  const system = (event) => change((conversation() ?? begin()).id, { system: event.target.value });
  const tools = (event) => {
    event.target.setCustomValidity(validTools(event.target.value));
    if (event.target.reportValidity()) set("tools")(event);
  };
  return (
    <dialog ref={dialog} onClose={close} aria-labelledby="settings-title">
      <form method="dialog">
        <h2 id="settings-title">Settings</h2>
        {needsKey() && (
          <label>API key <small>kept until this tab is closed</small>
            <input type="password" autocomplete="off" value={apiKey.value} onChange={(event) => { apiKey.value = event.target.value.trim(); connect(); }} />
          </label>
        )}
        <label>System prompt <small>of this conversation</small>
          <textarea rows="2" value={conversation()?.system ?? ""} onInput={system} />
        </label>
        <label>Denoising
          <select value={now.preset} onChange={set("preset")}>
            {Object.entries(PRESETS).map(([value, text]) => <option key={value} value={value}>{text}</option>)}
          </select>
        </label>
        <div class="pair">
          <label>Temperature <input type="number" min="0" max="2" step="0.1" placeholder="1" value={now.temperature} onChange={set("temperature")} /></label>
          <label>Most tokens <input type="number" min="1" placeholder="no limit" value={now.maxTokens} onChange={set("maxTokens")} /></label>
        </div>
        <label>Tools <small>JSON, in OpenAI's form</small>
          <textarea rows="2" spellcheck={false} value={now.tools} onChange={tools} />
        </label>
        <label class="check"><input type="checkbox" checked={now.thinking} onChange={set("thinking")} /> Think before answering</label>
        <label class="check"><input type="checkbox" checked={now.watch} onChange={set("watch")} /> Watch the canvas</label>
        <label>Colours
          <select value={now.theme} onChange={set("theme")}><option value="auto">As the system has them</option><option value="light">Light</option><option value="dark">Dark</option></select>
        </label>
        <div class="actions"><button class="strong">Done</button></div>
      </form>
    </dialog>
  );
}
