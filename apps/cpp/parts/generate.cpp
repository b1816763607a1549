// ---- sampling, stop strings, the loop ------------------------------------------------------------------------------

namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

std::vector<double> softmax(const std::vector<double>& logits) {
  const double most = *std::max_element(logits.begin(), logits.end());
  std::vector<double> chances(logits.size());
  double sum = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) sum += chances[i] = std::exp(logits[i] - most);
  for (double& chance : chances) chance /= sum;
  return chances;
}

// Penalties, then temperature, top-k, top-p, min-p: in this order, as transformers does.
class Sampler {
 public:
  explicit Sampler(const Sampling& how) : how_(how), random_(how.seed) {
    if (how.temperature < 0 || how.top_p <= 0 || how.top_p > 1 || how.min_p < 0 || how.min_p > 1 || how.repetition_penalty <= 0)
      fail("the sampling means nothing: temperature from 0, top_p above 0 up to 1, min_p from 0 to 1, repetition_penalty above 0");
  }

  // seen: all tokens that the decoder has read or written.
  Token pick(std::span<const float> given, std::span<const Token> seen) {
    std::vector<double> logits(given.begin(), given.end());
    if (how_.repetition_penalty != 1) {
      const std::set<Token> once(seen.begin(), seen.end());
      for (const Token token : once) {
        double& logit = logits[static_cast<std::size_t>(token)];
        logit = logit < 0 ? logit * how_.repetition_penalty : logit / how_.repetition_penalty;
      }
    }
    if (const std::size_t n = how_.no_repeat_ngram; n > 0 && seen.size() + 1 >= n) {
      const auto ending = seen.subspan(seen.size() - (n - 1));
      for (std::size_t i = 0; i + n <= seen.size(); ++i)
        if (std::equal(ending.begin(), ending.end(), seen.begin() + static_cast<std::ptrdiff_t>(i)))
          logits[static_cast<std::size_t>(seen[i + n - 1])] = kNone;
    }
    if (how_.temperature == 0) return std::max_element(logits.begin(), logits.end()) - logits.begin();
    return draw(logits);
  }

 private:
  Token draw(std::vector<double>& logits) {
    for (double& logit : logits) logit /= how_.temperature;
    std::vector<std::size_t> order(logits.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&logits](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
    if (how_.top_k > 0 && how_.top_k < order.size()) {
      const double least = logits[order[how_.top_k - 1]];
      for (double& logit : logits)
        if (logit < least) logit = kNone;
    }
    if (how_.top_p < 1) {
      const std::vector<double> chances = softmax(logits);
      double before = 0;
      for (const std::size_t i : order) {
        if (before >= how_.top_p) logits[i] = kNone;
        before += chances[i];
      }
    }
    std::vector<double> chances = softmax(logits);
    const double most = *std::max_element(chances.begin(), chances.end());
    for (double& chance : chances)
      if (chance < how_.min_p * most) chance = 0;
    return std::discrete_distribution<Token>(chances.begin(), chances.end())(random_);
  }

  Sampling how_;
  std::mt19937_64 random_;
};

// The text of tokens as they come, up to a stop string; half a character, and what may become a stop string, is held back.
class Writer {
 public:
  Writer(const Tokenizer* tokenizer, std::vector<std::string> stops) : tokenizer_(tokenizer), stops_(std::move(stops)) {}

  bool stopped() const { return stopped_; }

  std::string put(Token token) {
    ids_.push_back(token);
    if (tokenizer_ == nullptr) return {};
    const std::span<const Token> ids(ids_);
    const std::string known = tokenizer_->decode(ids.subspan(from_, shown_ - from_));
    const std::string now = tokenizer_->decode(ids.subspan(from_));
    if (now.size() <= known.size() || now.ends_with("\xEF\xBF\xBD")) return {};
    from_ = shown_;
    shown_ = ids_.size();
    return show(now.substr(known.size()), false);
  }

  std::string end() {
    if (tokenizer_ == nullptr || stopped_) return {};
    const std::span<const Token> ids(ids_);
    const std::string known = tokenizer_->decode(ids.subspan(from_, shown_ - from_));
    const std::string now = tokenizer_->decode(ids.subspan(from_));
    return show(now.size() > known.size() ? now.substr(known.size()) : std::string(), true);
  }

 private:
  std::string show(const std::string& piece, bool last) {
    held_ += piece;
    std::size_t cut = std::string::npos, kept = 0;
    for (const std::string& stop : stops_) {
      cut = std::min(cut, held_.find(stop));
      for (std::size_t n = 1; !last && n < stop.size(); ++n)
        if (held_.ends_with(stop.substr(0, n))) kept = std::max(kept, n);
    }
    stopped_ = cut != std::string::npos;
    const std::size_t size = stopped_ ? cut : held_.size() - kept;
    std::string out = held_.substr(0, size);
    held_.erase(0, size);
    return out;
  }

  const Tokenizer* tokenizer_;
  std::vector<std::string> stops_;
  std::vector<Token> ids_;
  std::size_t from_ = 0, shown_ = 0;
  std::string held_;
  bool stopped_ = false;
};

double seconds_since(std::chrono::steady_clock::time_point began) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

}  // namespace

const char* name_of(Ending ending) {
  switch (ending) {
    case Ending::end: return "end";
    case Ending::limit: return "limit";
    case Ending::context: return "context";
    case Ending::stop: return "stop";
    default: return "cancelled";
  }
}

Answer Model::generate(std::string_view prompt, const GenerateOptions& options) { return generate(read_prompt(prompt, options.chat), options); }

Answer Model::generate(std::span<const Token> prompt, const GenerateOptions& options) {
  const ModelState& model = *state_;
  auto now = std::chrono::steady_clock::now();
  const std::size_t most = std::min(options.max_new_tokens.value_or(model.info.max_new_tokens), model.info.max_context - 1);
  Sampler sampler(options.sampling.value_or(model.info.sampling));
  std::vector<std::string> stops = model.stop_strings;
  stops.insert(stops.end(), options.stops.begin(), options.stops.end());
  if (std::any_of(stops.begin(), stops.end(), [](const std::string& stop) { return stop.empty(); })) fail("an empty stop string would stop before the first letter; give some text");
  const std::unique_ptr<StreamState> stream = start_stream(*state_, prompt, most, options.memory);
  Writer writer(model.tokenizer ? &*model.tokenizer : nullptr, std::move(stops));
  Answer answer;
  answer.prompt_tokens = prompt.size();
  const auto tell = [&](const std::string& piece) {
    answer.text += piece;
    return piece.empty() || !options.on_text || options.on_text(piece);
  };
  std::vector<Token> seen;
  std::span<const float> logits = stream->feed(stream->pending);
  while (true) {
    seen.assign(stream->read.begin(), stream->read.end());
    const Token token = sampler.pick(logits, seen);
    if (answer.tokens.empty()) {
      answer.first_seconds = seconds_since(now);
      now = std::chrono::steady_clock::now();
    }
    if (std::find(model.info.stops.begin(), model.info.stops.end(), token) != model.info.stops.end()) {
      answer.ending = Ending::end;
      break;
    }
    answer.tokens.push_back(token);
    const bool goes_on = tell(writer.put(token));
    answer.ending = !goes_on ? Ending::cancelled : writer.stopped() ? Ending::stop : answer.tokens.size() == most ? Ending::limit : Ending::context;
    if (!goes_on || writer.stopped() || answer.tokens.size() == most || stream->past >= stream->capacity) break;
    logits = stream->feed({&token, 1});
  }
  if (answer.ending != Ending::cancelled && !tell(writer.end())) answer.ending = Ending::cancelled;
  if (writer.stopped()) answer.ending = Ending::stop;
  answer.seconds = seconds_since(now);
  return answer;
}
