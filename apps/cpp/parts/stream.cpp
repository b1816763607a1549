// ---- one answer under way ------------------------------------------------------------------------------------------

struct StreamState {
  explicit StreamState(ModelState& owner) : model(owner), turn(owner) {}

  ModelState& model;
  Turn turn;
  std::size_t past = 0, capacity = 0, sequence = 0;
  std::vector<Token> pending, read;
  std::vector<Token> slots;  // which row of the memory stands at each position, or -1
  Named held;                // what the bindings point at
  std::optional<Calls> calls;
  const float* logits = nullptr;

  std::span<const float> feed(std::span<const Token> tokens);

 private:
  void step(std::span<const Token> tokens);
};

namespace {

void bind_tokens(Calls& calls, Named& held, const Graph& graph, std::span<const Token> tokens, std::size_t past, std::size_t& sequence) {
  if (sequence != tokens.size()) {
    sequence = tokens.size();
    const auto size = static_cast<std::int64_t>(sequence);
    held["input_ids"] = ints(tokens, {1, size});
    calls.input("input_ids", held["input_ids"].get());
    if (graph.reads("slots")) {
      held["slots"] = zeros(type_named("int64"), {size});
      calls.input("slots", held["slots"].get());
    }
  }
  std::copy(tokens.begin(), tokens.end(), data_of<Token>(held["input_ids"]));
  *data_of<Token>(held["past_length"]) = static_cast<Token>(past);
}

void encode(StreamState& stream, std::span<const Token> prompt, std::size_t new_tokens) {
  ModelState& model = stream.model;
  if (prompt.size() > model.info.max_context)
    fail("the prompt has " + std::to_string(prompt.size()) + " tokens, the model reads at most " + std::to_string(model.info.max_context) +
         "; shorten it");
  if (!model.decoder_start) fail("app.json has no decoder_start; embed the bundle again");
  stream.capacity = std::min(model.info.max_context, new_tokens + 1 + model.forced.size());
  const auto source = static_cast<std::int64_t>(prompt.size());
  Named given;
  given["input_ids"] = ints(prompt, {1, source});
  given["encoder_mask"] = zeros(type_named("bool"), {1, source});
  std::memset(data_of<void>(given["encoder_mask"]), 1, prompt.size());
  Named encoded = run_once(model.graph("encoder"), given);
  stream.held = run_once(model.graph("cross_kv"), encoded);
  stream.held["encoder_mask"] = std::move(given["encoder_mask"]);
  stream.pending = {*model.decoder_start};
  stream.pending.insert(stream.pending.end(), model.forced.begin(), model.forced.end());
}

// The prompt behind the rows of a memory: a token 0 stands for each of them.
void splice(StreamState& stream, std::span<const Token> prompt, const Memory* memory) {
  const Context& context = *stream.model.context;
  const std::size_t rows = memory == nullptr ? 0 : memory->rows;
  if (rows > context.rows)
    fail("the context gives " + std::to_string(rows) + " rows of memory, the model takes " + std::to_string(context.rows) + "; give a shorter one");
  if (memory != nullptr && (memory->fingerprint != stream.model.info.fingerprint || memory->values.size() != rows * context.hidden))
    fail("the memory was made by another model, or by other weights of this one; read the context again");
  const std::size_t early = context.released && rows > 0 ? 1 : 0;
  const std::size_t lead = context.prefix.size() - std::min(early, context.prefix.size());
  stream.pending.assign(context.prefix.begin(), context.prefix.begin() + static_cast<std::ptrdiff_t>(lead));
  stream.pending.insert(stream.pending.end(), rows + early, 0);
  stream.pending.insert(stream.pending.end(), prompt.begin(), prompt.end());
  stream.slots.assign(lead, -1);
  for (std::size_t row = 0; row < rows; ++row) stream.slots.push_back(static_cast<Token>(row));
  Value values = zeros(type_named("float32"), {1, static_cast<std::int64_t>(std::max<std::size_t>(1, rows)), static_cast<std::int64_t>(context.hidden)});
  if (memory != nullptr) std::copy(memory->values.begin(), memory->values.end(), data_of<float>(values));
  stream.held["memory"] = std::move(values);
}

std::unique_ptr<StreamState> start_stream(ModelState& model, std::span<const Token> prompt, std::size_t new_tokens, const Memory* memory) {
  auto stream = std::make_unique<StreamState>(model);
  const Info& info = model.info;
  if (info.embedding) fail("this model makes vectors, and generates nothing; use embed");
  require_tokens(prompt, info.vocab, "the prompt");
  if (new_tokens == 0) fail("0 new tokens were asked for; ask for 1 or more");
  if (memory != nullptr && !model.context) fail("this model keeps no memory of a context; give all of it as the prompt");
  if (info.task == "seq2seq") {
    encode(*stream, prompt, new_tokens);
  } else {
    if (model.context) {
      splice(*stream, prompt, memory);
    } else {
      stream->pending.assign(prompt.begin(), prompt.end());
    }
    if (stream->pending.size() >= info.max_context)
      fail("the prompt has " + std::to_string(stream->pending.size()) + " tokens, the model's context is " + std::to_string(info.max_context) +
           "; shorten it");
    stream->capacity = std::min(info.max_context, stream->pending.size() + new_tokens);
  }
  const Token last = 0;
  stream->held["past_length"] = ints({&last, 1}, {1});
  stream->held["logit_positions"] = ints({&last, 1}, {1});
  stream->held["logits"] = zeros(type_named("float32"), {1, 1, static_cast<std::int64_t>(info.vocab)});
  stream->logits = data_of<float>(stream->held["logits"]);
  stream->calls.emplace(model.graph("decoder"), stream->capacity, stream->held);
  stream->calls->output("logits", stream->held["logits"].get());
  return stream;
}

// The memory of one part of a context, appended to `values`.
void read_part(ModelState& model, std::span<const Token> part, std::vector<float>& values) {
  const Context& context = *model.context;
  const Graph& graph = model.graph("context");
  if (context.tokens.empty()) {
    Named given;
    given["input_ids"] = ints(part, {1, static_cast<std::int64_t>(part.size())});
    const Named made = run_once(graph, given);
    const Value& memory = made.at("memory");
    const float* data = data_of<float>(memory);
    values.insert(values.end(), data, data + count_of(shape_of(memory)));
    return;
  }
  std::vector<Token> ids(part.begin(), part.end());
  ids.insert(ids.end(), context.tokens.begin(), context.tokens.end());
  const Token zero = 0;
  Named held;
  held["past_length"] = ints({&zero, 1}, {1});
  Calls calls(graph, ids.size(), held);
  std::size_t sequence = 0;
  for (std::size_t at = 0; at < ids.size(); at += model.chunk) {
    const std::span<const Token> tokens(ids.data() + at, std::min(model.chunk, ids.size() - at));
    bind_tokens(calls, held, graph, tokens, at, sequence);
    std::vector<Token> wanted;
    for (std::size_t i = 0; i < tokens.size(); ++i)
      if (at + i >= part.size()) wanted.push_back(static_cast<Token>(i));
    const bool keeps = !wanted.empty();
    if (!keeps) wanted.push_back(static_cast<Token>(tokens.size() - 1));
    const auto rows = static_cast<std::int64_t>(wanted.size());
    held["logit_positions"] = ints(wanted, {rows});
    held["memory"] = zeros(type_named("float32"), {1, rows, static_cast<std::int64_t>(context.hidden)});
    calls.input("logit_positions", held["logit_positions"].get());
    calls.output("memory", held["memory"].get());
    calls.run();
    const float* data = data_of<float>(held["memory"]);
    if (keeps) values.insert(values.end(), data, data + wanted.size() * context.hidden);
  }
}

}  // namespace

// Appends tokens, in calls of at most the chunk of app.json; the logits of the last one.
std::span<const float> StreamState::feed(std::span<const Token> tokens) {
  if (past + tokens.size() > capacity)
    fail(std::to_string(past + tokens.size()) + " tokens do not fit the context of " + std::to_string(capacity) + "; ask for fewer new tokens, or shorten the prompt");
  for (std::size_t at = 0; at < tokens.size(); at += model.chunk) step(tokens.subspan(at, std::min(model.chunk, tokens.size() - at)));
  return {logits, model.info.vocab};
}

void StreamState::step(std::span<const Token> tokens) {
  const Graph& graph = model.graph("decoder");
  bind_tokens(*calls, held, graph, tokens, past, sequence);
  *data_of<Token>(held["logit_positions"]) = static_cast<Token>(tokens.size() - 1);
  if (graph.reads("slots")) {
    Token* rows = data_of<Token>(held["slots"]);
    for (std::size_t i = 0; i < tokens.size(); ++i) rows[i] = past + i < slots.size() ? slots[past + i] : -1;
  }
  calls->run();
  past += tokens.size();
  read.insert(read.end(), tokens.begin(), tokens.end());
}

Stream::Stream(std::unique_ptr<StreamState> state) : state_(std::move(state)) {}
Stream::~Stream() = default;
Stream::Stream(Stream&&) noexcept = default;
Stream& Stream::operator=(Stream&&) noexcept = default;
std::size_t Stream::past() const { return state_->past; }
std::size_t Stream::capacity() const { return state_->capacity; }

std::span<const float> Stream::prefill() {
  if (state_->past > 0) fail("the prompt has been read already; feed tokens");
  return state_->feed(state_->pending);
}

std::span<const float> Stream::feed(Token token) {
  if (state_->past == 0) fail("the prompt has not been read yet; call prefill first");
  require_tokens({&token, 1}, state_->model.info.vocab, "the stream");
  return state_->feed({&token, 1});
}

Stream Model::start(std::span<const Token> prompt, std::size_t new_tokens, const Memory* memory) {
  return Stream(start_stream(*state_, prompt, new_tokens, memory));
}

Memory Model::read_context(std::string_view context) { return read_context(tokens(context)); }

Memory Model::read_context(std::span<const Token> ids) {
  ModelState& model = *state_;
  if (!model.context) fail("this model reads no context; give all of it as the prompt");
  const Turn turn(model);
  require_tokens(ids, static_cast<std::size_t>(model.context->vocab), "the context");
  Memory memory;
  memory.fingerprint = model.info.fingerprint;
  for (std::size_t at = 0; at < ids.size(); at += model.context->window)
    read_part(model, ids.subspan(at, std::min(model.context->window, ids.size() - at)), memory.values);
  memory.rows = memory.values.size() / model.context->hidden;
  return memory;
}

void Memory::save(const fs::path& file) const {
  std::ofstream out(file, std::ios::binary);
  const Json head = {{"edgewright.memory", fingerprint}, {"rows", rows}, {"bytes", values.size() * sizeof(float)}};
  out << head.dump() << "\n";
  out.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
  if (!out.flush()) fail(shown(file) + " cannot be written; look at the disk");
}

Memory Memory::load(const fs::path& file) {
  const std::string data = read_file(file);
  const std::size_t end = std::min(data.find('\n'), data.size());
  const Json head = Json::parse(data.substr(0, end), nullptr, false);
  const std::string line = shown(file) + " is no memory of a context; read the context again and save it";
  if (!head.is_object() || !head.contains("edgewright.memory") || !head.contains("rows")) fail(line);
  Memory memory;
  memory.fingerprint = head.value("edgewright.memory", std::string());
  memory.rows = head.value("rows", std::size_t{0});
  const std::size_t bytes = data.size() - std::min(data.size(), end + 1);
  if (bytes % sizeof(float) != 0 || bytes != head.value("bytes", std::size_t{0})) fail(line);
  memory.values.resize(bytes / sizeof(float));
  std::memcpy(memory.values.data(), data.data() + end + 1, bytes);
  return memory;
}
