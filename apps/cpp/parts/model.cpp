// ---- the model: app.json opened ------------------------------------------------------------------------------------

Port port_of(const Json& json) {
  return {json.at("name").get<std::string>(), json.at("dtype").get<std::string>(), json.at("shape"),
          json.value("kind", std::string()) == "kv", json.value("updated", false)};
}

std::vector<Port> ports_of(const Json& json) {
  std::vector<Port> ports;
  for (const Json& port : json) ports.push_back(port_of(port));
  return ports;
}

std::vector<Token> tokens_of(const Json& json) { return json.get<std::vector<Token>>(); }

struct Context {
  std::size_t window = 0, hidden = 0, rows = 0;
  Token vocab = 0;
  std::vector<Token> tokens, prefix;
  bool released = false;
};

}  // namespace

struct ModelState {
  Info info;
  std::map<std::string, Graph> graphs;
  std::optional<Tokenizer> tokenizer;
  std::vector<Token> before, after, forced;
  std::vector<std::string> stop_strings;
  std::map<std::string, std::string> prompts;
  std::optional<std::string> default_prompt;
  std::optional<Token> bos, decoder_start;
  std::optional<std::pair<std::string, std::string>> chat;
  bool chat_template = false, chat_trims = false;
  std::optional<Context> context;
  std::size_t chunk = 1;
  std::atomic<bool> busy{false};

  const Graph& graph(const std::string& name) const {
    const auto found = graphs.find(name);
    if (found == graphs.end()) fail("app.json has no graph " + name + "; embed the bundle again");
    return found->second;
  }

  const Tokenizer& reader() const {
    if (!tokenizer) fail(info.name + " has no tokenizer: give it token ids");
    return *tokenizer;
  }
};

namespace {

void read_app(const Json& app, ModelState& model) {
  if (app.at("schema_version") != 1) fail("app.json is of another version; embed the bundle again, or build this client anew");
  Info& info = model.info;
  info.name = app.at("name").get<std::string>();
  info.task = app.at("task").get<std::string>();
  info.fingerprint = app.at("fingerprint").get<std::string>();
  info.vocab = app.at("vocab").get<std::size_t>();
  info.max_context = app.at("max_context").get<std::size_t>();
  info.max_new_tokens = app.at("max_new_tokens").get<std::size_t>();
  info.memory_bytes = app.at("memory").at("total").get<std::size_t>();
  info.stops = tokens_of(app.at("stops").at("tokens"));
  model.stop_strings = app.at("stops").at("strings").get<std::vector<std::string>>();
  const Json& sampling = app.at("sampling");
  info.sampling.temperature = sampling.at("temperature").get<double>();
  info.sampling.top_p = sampling.at("top_p").get<double>();
  info.sampling.min_p = sampling.at("min_p").get<double>();
  info.sampling.top_k = sampling.at("top_k").get<std::size_t>();
  info.sampling.repetition_penalty = sampling.at("repetition_penalty").get<double>();
  info.sampling.no_repeat_ngram = sampling.at("no_repeat_ngram").get<std::size_t>();
  model.chunk = std::max<std::size_t>(1, app.at("prefill_chunk").get<std::size_t>());
  model.forced = tokens_of(app.at("forced"));
  if (!app.at("decoder_start").is_null()) model.decoder_start = app["decoder_start"].get<Token>();
  if (const Json& context = app.at("context"); !context.is_null()) {
    model.context = {context.at("window").get<std::size_t>(), context.at("hidden").get<std::size_t>(),
                     context.at("rows").get<std::size_t>(),   context.at("vocab").get<Token>(),
                     tokens_of(context.at("tokens")),         tokens_of(context.at("prefix")),
                     context.at("splice") == "released"};
  }
  if (const Json embedding = app.value("embedding", Json()); !embedding.is_null()) {
    Embedding made{embedding.at("size").get<std::size_t>(), embedding.at("normalised").get<bool>(), embedding.at("similarity").get<std::string>(), {}};
    model.prompts = embedding.at("prompts").get<std::map<std::string, std::string>>();
    for (const auto& [name, prompt] : model.prompts) made.prompts.push_back(name);
    if (!embedding.at("default_prompt").is_null()) model.default_prompt = embedding["default_prompt"].get<std::string>();
    info.embedding = std::move(made);
  }
  if (const Json& chat = app.at("chat"); !chat.is_null()) {
    model.chat_template = true;
    model.chat_trims = chat.at("trims").get<bool>();
    if (!chat.at("before").is_null()) model.chat = {chat["before"].get<std::string>(), chat.at("after").get<std::string>()};
  }
  if (const Json& tokenizer = app.at("tokenizer"); !tokenizer.is_null()) {
    model.before = tokens_of(tokenizer.at("before"));
    model.after = tokens_of(tokenizer.at("after"));
    if (!tokenizer.at("bos").is_null()) model.bos = tokenizer["bos"].get<Token>();
    info.has_tokenizer = true;
  }
}

// Marks the model as busy, or says that it is.
class Turn {
 public:
  explicit Turn(ModelState& model) : model_(&model) {
    if (model.busy.exchange(true)) fail("the model is answering already; wait for that answer, cancel it, or open a second model");
  }
  ~Turn() { model_->busy = false; }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  ModelState* model_;
};

void require_tokens(std::span<const Token> ids, std::size_t vocab, const std::string& whose) {
  if (ids.empty()) fail(whose + " has no tokens; give some text");
  for (const Token id : ids)
    if (id < 0 || static_cast<std::size_t>(id) >= vocab)
      fail(whose + " has the token " + std::to_string(id) + ", the model has " + std::to_string(vocab) + "; is the tokenizer another model's?");
}

}  // namespace

Model::Model(const fs::path& folder, const LoadOptions& options) : state_(std::make_unique<ModelState>()) {
  try {
    const Json app = read_json(folder / "app.json");
    read_app(app, *state_);
    check_files(folder, app.at("files"), options.check_hashes);
    if (state_->info.has_tokenizer) state_->tokenizer.emplace(read_json(folder / app["tokenizer"].at("file").get<std::string>()));
    for (const Json& graph : app.at("graphs")) {
      Graph opened{ports_of(graph.at("inputs")), ports_of(graph.at("outputs")), ports_of(graph.at("states")), nullptr};
      opened.session = open_graph(folder / graph.at("file").get<std::string>(), options.threads, graph.at("onnxruntime").get<std::string>());
      state_->graphs.emplace(graph.at("name").get<std::string>(), std::move(opened));
    }
  } catch (const Json::exception& error) {
    fail(shown(folder) + ": app.json or tokenizer.json is not as it was written (" + error.what() + "); copy the folder again");
  }
}

Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
const Info& Model::info() const { return state_->info; }

std::vector<Token> Model::tokens(std::string_view text) const { return state_->reader().encode(text); }
std::string Model::text(std::span<const Token> ids) const { return state_->reader().decode(ids); }

std::vector<Token> Model::read_prompt(std::string_view prompt, bool chat) const {
  const ModelState& model = *state_;
  const Chars chars = chars_of(prompt);
  if (std::all_of(chars.begin(), chars.end(), is_space)) fail("the prompt is empty; give some text");
  std::vector<Token> ids;
  if (chat && model.chat_template) {
    if (!model.chat) fail("the chat template takes no lone question; render app.json's chat.template, or pass chat = false");
    std::size_t from = 0, to = chars.size();
    while (model.chat_trims && is_space(chars[from])) ++from;
    while (model.chat_trims && is_space(chars[to - 1])) --to;
    ids = tokens(model.chat->first + utf8_of(std::u32string_view(chars).substr(from, to - from)) + model.chat->second);
  } else {
    ids = model.before;
    const std::vector<Token> inner = tokens(prompt);
    ids.insert(ids.end(), inner.begin(), inner.end());
    ids.insert(ids.end(), model.after.begin(), model.after.end());
  }
  if (model.bos && ids.size() > 1 && ids[0] == *model.bos && ids[1] == *model.bos) ids.erase(ids.begin());
  return ids;
}
