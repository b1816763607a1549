// ---- vectors of texts ----------------------------------------------------------------------------------------------

std::vector<Token> Model::read_text(std::string_view text, const std::optional<std::string>& prompt_name) const {
  const ModelState& model = *state_;
  if (!model.info.embedding) fail("this model makes no vectors; use generate");
  const Chars chars = chars_of(text);
  if (std::all_of(chars.begin(), chars.end(), is_space)) fail("the text is empty; give some text");
  const std::optional<std::string> name = prompt_name ? prompt_name : model.default_prompt;
  std::string whole;
  if (name) {
    const auto found = model.prompts.find(*name);
    if (found == model.prompts.end()) {
      std::string known;
      for (const auto& [other, prompt] : model.prompts) known += (known.empty() ? "" : ", ") + other;
      fail(*name + " is no prompt of this model; it has: " + (known.empty() ? "none" : known));
    }
    whole = found->second;
  }
  std::vector<Token> inner = tokens(whole + std::string(text));
  const std::size_t most = model.info.max_context, around = model.before.size() + model.after.size();
  if (inner.size() + around > most) inner.resize(most > around ? most - around : 0);
  std::vector<Token> ids = model.before;
  ids.insert(ids.end(), inner.begin(), inner.end());
  ids.insert(ids.end(), model.after.begin(), model.after.end());
  if (ids.size() > most) ids.resize(most);
  return ids;
}

std::vector<float> Model::embed(std::string_view text, const std::optional<std::string>& prompt_name) { return embed(read_text(text, prompt_name)); }

std::vector<float> Model::embed(std::span<const Token> ids) {
  ModelState& model = *state_;
  if (!model.info.embedding) fail("this model makes no vectors; use generate");
  const Turn turn(model);
  require_tokens(ids, model.info.vocab, "the text");
  if (ids.size() > model.info.max_context)
    fail("the text has " + std::to_string(ids.size()) + " tokens, the model reads at most " + std::to_string(model.info.max_context) + "; shorten it");
  const auto size = static_cast<std::int64_t>(ids.size());
  Named given;
  given["input_ids"] = ints(ids, {1, size});
  given["encoder_mask"] = zeros(type_named("bool"), {1, size});
  std::memset(data_of<void>(given["encoder_mask"]), 1, ids.size());
  const Named made = run_once(model.graph("encoder"), given);
  const Value& vector = made.at("sentence_embedding");
  const float* data = data_of<float>(vector);
  return {data, data + count_of(shape_of(vector))};
}
