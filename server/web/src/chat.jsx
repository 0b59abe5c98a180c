// The chat: conversations at the side, messages, and where one writes.
import { useEffect, useRef, useState } from "preact/hooks";
import { forgetDrafts } from "./drafts.js";
import { KINDS, shrunk } from "./images.js";
import { Images, Message } from "./message.jsx";
import { Settings } from "./settings.jsx";
import { apiKey, begin, conversation, conversations, current, full, remove } from "./store.js";
import { connect, fault, model, running, seesImages, send } from "./talk.js";

const IDEAS = ["What is 17 + 25?", "Write a story about Mia and a fox.", "Name three animals as a list."];

function Sidebar({ open, close }) {
  const forget = (each) => {
    if (!confirm(`Delete “${each.title || "New conversation"}”?`)) return;
    forgetDrafts(each.messages.map((message) => message.id));
    remove(each.id);
  };
  return (
    <nav class={open ? "open" : ""} aria-label="Conversations">
      <button class="strong" disabled={running.value !== null} onClick={() => { begin(); close(); }}>New conversation</button>
      <ul>
        {conversations.value.map((each) => (
          <li key={each.id} class={each.id === current.value ? "current" : ""}>
            <button class="title" aria-current={each.id === current.value ? "page" : undefined} disabled={running.value !== null}
              onClick={() => { current.value = each.id; close(); }}>{each.title || "New conversation"}</button>
            <button class="quiet" aria-label={`Delete ${each.title || "New conversation"}`} disabled={running.value !== null} onClick={() => forget(each)}>×</button>
          </li>
        ))}
      </ul>
      <a href="/stats">Server statistics</a>
    </nav>
  );
}

function Banner() {
  const [key, setKey] = useState("");
  if (fault.value === "away") return <p class="banner" role="alert">The server does not answer. Waiting for it to come back …</p>;
  if (full.value) return <p class="banner" role="alert">The browser has no room left: delete conversations you do not need.</p>;
  if (fault.value !== "key") return null;
  return (
    <form class="banner" onSubmit={(event) => { event.preventDefault(); apiKey.value = key.trim(); connect(); }}>
      <label>This server wants an API key <input type="password" autocomplete="off" value={key} onInput={(event) => setKey(event.target.value)} /></label>
      <button>Use it</button>
    </form>
  );
}

function Composer() {
  const [text, setText] = useState("");
  const [images, setImages] = useState([]);
  const [unread, setUnread] = useState("");
  const field = useRef();
  const busy = running.value !== null;
  const empty = !text.trim() && !images.length;
  const submit = (event) => {
    event?.preventDefault();
    if (busy || empty) return;
    send(text, images);
    setText("");
    setImages([]);
    field.current.style.height = "auto";
  };
  const grow = (event) => {
    setText(event.target.value);
    field.current.style.height = "auto";
    field.current.style.height = `${Math.min(field.current.scrollHeight, 240)}px`;
  };
  const key = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  const attach = async (files) => {
    setUnread("");
    for (const file of files) {
      try {
        const url = await shrunk(file);
        setImages((before) => [...before, url]);
      } catch {
        setUnread(`${file.name} is not an image that can be read.`);
      }
    }
  };
  const picked = (event) => {
    attach([...event.target.files]);
    event.target.value = "";
  };
  const pasted = (event) => {
    if (!seesImages.value || !event.clipboardData.files.length) return;
    event.preventDefault();
    attach([...event.clipboardData.files]);
  };
  return (
    <form class="composer" onSubmit={submit}>
      <Images urls={images} drop={(index) => setImages(images.filter((_, each) => each !== index))} />
      {unread && <p class="fault" role="alert">{unread}</p>}
      {seesImages.value && <label class="attach" title="Attach images">▣<input class="hidden" type="file" multiple accept={KINDS} aria-label="Attach images" onChange={picked} /></label>}
      <textarea ref={field} rows="1" aria-label="Message" placeholder="Write a message" value={text} onInput={grow} onKeyDown={key} onPaste={pasted} />
      {busy ? <button type="button" class="strong" onClick={() => running.value.stop()}>Stop</button> : <button class="strong" disabled={empty}>Send</button>}
    </form>
  );
}

// What grows at the end stays in sight, unless the reader has scrolled away from it.
function followEnd(view) {
  let follows = true;
  const scrolled = () => (follows = view.scrollHeight - view.scrollTop - view.clientHeight < 80);
  const grown = new ResizeObserver(() => follows && view.scrollTo({ top: view.scrollHeight }));
  view.addEventListener("scroll", scrolled, { passive: true });
  grown.observe(view.firstElementChild);
  return () => {
    view.removeEventListener("scroll", scrolled);
    grown.disconnect();
  };
}

export function Chat() {
  const [menu, setMenu] = useState(false);
  const [settings, setSettings] = useState(false);
  const view = useRef();
  const messages = conversation()?.messages ?? [];
  const last = messages.at(-1);
  useEffect(() => { connect(); }, []);
  useEffect(() => {
    document.title = conversation()?.title ? `${conversation().title} · easel` : "easel";
  }, [conversation()?.title]);
  useEffect(() => followEnd(view.current), []);
  useEffect(() => view.current.scrollTo({ top: view.current.scrollHeight }), [current.value, messages.length]);
  return (
    <div class="layout">
      <Sidebar open={menu} close={() => setMenu(false)} />
      <div class="main">
        <header class="bar">
          <button class="quiet menu" aria-expanded={menu} aria-label="Conversations" onClick={() => setMenu(!menu)}>☰</button>
          <h1>easel</h1><span class="dim model">{model.value ?? ""}</span>
          <button class="quiet" onClick={() => setSettings(true)}>Settings</button>
        </header>
        <Banner />
        <main ref={view}>
         <div>
          {!messages.length && (
            <div class="welcome">
              <p>Text out of noise: a whole canvas at once.</p>
              <div class="ideas">{IDEAS.map((idea) => <button key={idea} onClick={() => send(idea)}>{idea}</button>)}</div>
            </div>
          )}
          {messages.map((message) => <Message key={message.id} message={message} messages={messages} />)}
          <p class="hidden" role="status">{running.value ? "The reply is coming" : last?.role === "assistant" ? "The reply is there" : ""}</p>
         </div>
        </main>
        <Composer />
      </div>
      {settings && <Settings close={() => setSettings(false)} />}
    </div>
  );
}
