// Which page: the chat, or what the server is at.
import { render } from "preact";
import { Chat } from "./chat.jsx";
import { Stats } from "./stats.jsx";
import "./style.css";

render(location.pathname === "/stats" ? <Stats /> : <Chat />, document.getElementById("page"));
