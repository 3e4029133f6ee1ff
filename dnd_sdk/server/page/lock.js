/** Asks for the API key when the server wants one, in place of the rest; it is kept for this tab only. */

import { useKey } from "./api.js";
import { byId, setText } from "./dom.js";

const SENDABLE = /^[\x21-\x7e]+$/;

/** `unlocked()` is called when there is a new key to try. */
export function lock({ unlocked }) {
  const [form, input, message, main] = ["key-form", "key-input", "key-message", "main"].map(byId);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const key = input.value.trim();
    if (!SENDABLE.test(key)) return setText(message, "A key has no spaces and none but plain characters.");
    useKey(key);
    input.value = "";
    unlocked();
  });
  return {
    /** With the server's words, and whether they are about a key that it was sent. */
    show(words, refused) {
      setText(message, refused ? `This key is refused: ${words}` : words);
      [form.hidden, main.hidden] = [false, true];
      input.focus();
    },
    hide() {
      if (form.hidden) return;
      [form.hidden, main.hidden] = [true, false];
      main.focus();
    },
  };
}
