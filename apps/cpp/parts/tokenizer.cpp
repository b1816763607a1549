// ---- tokenizer.json: text to tokens and back -----------------------------------------------------------------------
// WordLevel, WordPiece, BPE and Unigram; steps that are not known here are refused when the file is opened.

using Words = std::unordered_map<std::string, Token>;

struct Piece {
  Chars text;
  bool first = false;        // at the very start of the text
  std::optional<Token> id{};  // of an added token, which no step touches
};

std::string kind_of(const Json& step) { return step.value("type", std::string()); }

[[noreturn]] void unknown_part(const std::string& what) {
  fail("tokenizer.json has " + what + ", which this client does not know; embed the bundle again with this version");
}

// Spans that cover a text, joined and cut as a "behavior" of the tokenizers library says.
std::vector<Chars> cut(const Chars& text, std::vector<Span> spans, const std::string& behavior) {
  std::vector<Span> kept;
  for (const Span& span : spans) {
    if (span.begin == span.end) continue;
    if (behavior == "Removed") {
      if (!span.match) kept.push_back(span);
    } else if (behavior == "Contiguous") {
      if (!kept.empty() && kept.back().match == span.match) {
        kept.back().end = span.end;
      } else {
        kept.push_back(span);
      }
    } else if (behavior == "MergedWithPrevious") {
      if (span.match && !kept.empty() && !kept.back().match) {
        kept.back() = {kept.back().begin, span.end, true};
      } else {
        kept.push_back(span);
      }
    } else if (behavior == "MergedWithNext") {
      if (!span.match && !kept.empty() && kept.back().match) {
        kept.back() = {kept.back().begin, span.end, false};
      } else {
        kept.push_back(span);
      }
    } else if (behavior == "Isolated") {
      kept.push_back(span);
    } else {
      unknown_part("the behavior " + behavior);
    }
  }
  std::vector<Chars> parts;
  for (const Span& span : kept) parts.push_back(text.substr(span.begin, span.end - span.begin));
  return parts;
}

template <class Test>
std::vector<Span> spans_where(const Chars& text, Test test) {
  std::vector<Span> spans;
  std::size_t from = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (!test(text[i])) continue;
    spans.push_back({from, i, false});
    spans.push_back({i, i + 1, true});
    from = i + 1;
  }
  spans.push_back({from, text.size(), false});
  return spans;
}

// A byte as the printable character that byte-level vocabularies write it as.
char32_t char_of_byte(unsigned byte) {
  const auto plain = [](unsigned b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174; };
  if (plain(byte)) return byte;
  char32_t next = 256;
  for (unsigned b = 0; b < byte; ++b) next += plain(b) ? 0 : 1;
  return next;
}

void replace_all(Chars& text, const Chars& from, const Chars& to) {
  if (from.empty()) return;
  for (std::size_t at = 0; (at = text.find(from, at)) != Chars::npos; at += to.size()) text.replace(at, from.size(), to);
}

class Tokenizer {
 public:
  explicit Tokenizer(const Json& file) : file_(file) {
    const Json& model = file_.at("model");
    kind_ = kind_of(model);
    if (kind_ == "WordLevel" || kind_ == "WordPiece" || kind_ == "BPE") {
      for (const auto& [word, id] : model.at("vocab").items()) words_[word] = id.get<Token>();
    } else if (kind_ == "Unigram") {
      read_unigram(model);
    } else {
      unknown_part("a model of the kind " + kind_);
    }
    if (kind_ == "BPE") read_merges(model);
    if (kind_ == "WordPiece") {
      within_ = model.value("continuing_subword_prefix", "##");
      longest_ = model.value("max_input_chars_per_word", std::size_t{100});
    }
    if (model.contains("unk_token") && model["unk_token"].is_string()) {
      const auto found = words_.find(model["unk_token"].get<std::string>());
      if (found != words_.end()) unknown_ = found->second;
    }
    byte_fallback_ = model.value("byte_fallback", false);
    for (const auto& [word, id] : words_) spelling_[id] = word;
    for (const Json& token : file_.value("added_tokens", Json::array())) {
      Added added{chars_of(token.at("content").get<std::string>()), token.at("id").get<Token>(),
                  token.value("single_word", false), token.value("lstrip", false), token.value("rstrip", false)};
      if (token.value("special", false)) special_.insert(added.id);
      spelling_[added.id] = utf8_of(added.content);
      (token.value("normalized", true) ? normalized_ : raw_).push_back(std::move(added));
    }
    steps_of(file_, "normalizer", "normalizers", normalizer_);
    for (Added& added : normalized_) {
      added.content = normalize(added.content);
      spelling_[added.id] = utf8_of(added.content);  // as the library spells it
    }
    steps_of(file_, "pre_tokenizer", "pretokenizers", splitter_);
    steps_of(file_, "decoder", "decoders", decoder_);
    for (unsigned byte = 0; byte < 256; ++byte) bytes_[char_of_byte(byte)] = static_cast<char>(byte);
    encode("a");  // what is not known is refused now
    decode(std::vector<Token>{});
  }

  std::vector<Token> encode(std::string_view text) const {
    std::vector<Token> ids;
    std::vector<Piece> pieces;
    for (Piece& piece : extract({chars_of(text), true}, raw_)) {
      if (piece.id) {
        pieces.push_back(std::move(piece));
        continue;
      }
      piece.text = normalize(piece.text);
      for (Piece& inner : extract(std::move(piece), normalized_)) pieces.push_back(std::move(inner));
    }
    for (const Piece& piece : pieces) {
      if (piece.id) {
        ids.push_back(*piece.id);
        continue;
      }
      for (const Chars& word : split(piece)) add_word(word, ids);
    }
    return ids;
  }

  std::string decode(std::span<const Token> ids) const {
    std::vector<std::string> parts;
    for (const Token id : ids) {
      const auto found = spelling_.find(id);
      if (found != spelling_.end() && !special_.contains(id)) parts.push_back(found->second);
    }
    std::string out;
    if (decoder_.empty()) {
      for (std::size_t i = 0; i < parts.size(); ++i) out += (i > 0 ? " " : "") + parts[i];
      return out;
    }
    for (const Json& step : decoder_) parts = decoded(step, std::move(parts));
    for (const std::string& part : parts) out += part;
    return out;
  }

 private:
  struct Added {
    Chars content;
    Token id;
    bool single_word, lstrip, rstrip;
  };
  struct Merge {
    std::size_t rank;
    Token made;
  };

  static void steps_of(const Json& holder, const char* room, const char* inner, std::vector<Json>& into) {
    if (!holder.contains(room) || holder[room].is_null()) return;
    add_steps(holder[room], inner, into);
  }

  static void add_steps(const Json& step, const char* inner, std::vector<Json>& into) {
    if (kind_of(step) != "Sequence") {
      into.push_back(step);
      return;
    }
    for (const Json& part : step.at(inner)) add_steps(part, inner, into);
  }

  void read_merges(const Json& model) {
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
      if (model.contains(key) && model[key].is_string() && !model[key].get<std::string>().empty()) unknown_part(key);
    std::size_t rank = 0;
    for (const Json& merge : model.at("merges")) {
      std::string left, right;
      if (merge.is_string()) {
        const std::string both = merge.get<std::string>();
        const std::size_t at = both.find(' ');
        left = both.substr(0, at);
        right = both.substr(at + 1);
      } else {
        left = merge.at(0).get<std::string>();
        right = merge.at(1).get<std::string>();
      }
      const auto a = words_.find(left), b = words_.find(right), made = words_.find(left + right);
      if (a == words_.end() || b == words_.end() || made == words_.end())
        fail("tokenizer.json: a merge makes what is not in its vocabulary; copy the file again");
      merges_[{a->second, b->second}] = {rank++, made->second};
    }
    fuse_unknown_ = model.value("fuse_unk", false);
    ignore_merges_ = model.value("ignore_merges", false);
  }

  void read_unigram(const Json& model) {
    Token id = 0;
    least_score_ = 0;
    for (const Json& entry : model.at("vocab")) {
      const std::string word = entry.at(0).get<std::string>();
      const double score = entry.at(1).get<double>();
      words_[word] = id++;
      scores_.push_back(score);
      least_score_ = std::min(least_score_, score);
      longest_ = std::max(longest_, chars_of(word).size());
    }
    if (model.contains("unk_id") && model["unk_id"].is_number()) unknown_ = model["unk_id"].get<Token>();
  }

  // The text cut at added tokens, leftmost first, the longest of those that begin there.
  static std::vector<Piece> extract(Piece whole, const std::vector<Added>& tokens) {
    std::vector<Piece> pieces;
    const Chars& text = whole.text;
    std::size_t from = 0;
    for (std::size_t at = 0; at < text.size();) {
      const Added* best = nullptr;
      for (const Added& token : tokens)
        if (!token.content.empty() && (best == nullptr || token.content.size() > best->content.size()) &&
            text.compare(at, token.content.size(), token.content) == 0)
          best = &token;
      if (best == nullptr) {
        ++at;
        continue;
      }
      std::size_t begin = at, end = at + best->content.size();
      at = end;
      if (best->single_word && ((begin > 0 && is_word(text[begin - 1])) || (end < text.size() && is_word(text[end])))) continue;
      if (best->lstrip)
        while (begin > from && is_space(text[begin - 1])) --begin;
      if (best->rstrip)
        while (end < text.size() && is_space(text[end])) ++end;
      if (begin > from) pieces.push_back({text.substr(from, begin - from), whole.first && from == 0});
      pieces.push_back({{}, false, best->id});
      from = at = end;
    }
    if (from < text.size()) pieces.push_back({text.substr(from), whole.first && from == 0});
    return pieces;
  }

  Chars normalize(Chars text) const {
    for (const Json& step : normalizer_) {
      const std::string kind = kind_of(step);
      if (kind == "NFC") {
        text = nfc(text);
      } else if (kind == "BertNormalizer") {
        text = bert(step, std::move(text));
      } else if (kind == "Prepend") {
        if (!text.empty()) text = chars_of(step.at("prepend").get<std::string>()) + text;
      } else if (kind == "Replace" && step.at("pattern").contains("String")) {
        replace_all(text, chars_of(step["pattern"]["String"].get<std::string>()), chars_of(step.at("content").get<std::string>()));
      } else {
        unknown_part("the normalizer " + kind);
      }
    }
    return text;
  }

  static Chars bert(const Json& step, Chars text) {
    const bool lower = step.value("lowercase", true);
    const bool strips = step.contains("strip_accents") && step["strip_accents"].is_boolean() ? step["strip_accents"].get<bool>() : lower;
    if (step.value("clean_text", true)) text = cleaned(text);
    if (step.value("handle_chinese_chars", true)) text = with_ideographs_apart(text);
    if (strips) text = without_accents(text);
    return lower ? lowered(text) : text;
  }

  std::vector<Chars> split(const Piece& piece) const {
    std::vector<Chars> parts = {piece.text};
    bool first = piece.first;
    for (const Json& step : splitter_) {
      std::vector<Chars> next;
      for (std::size_t i = 0; i < parts.size(); ++i)
        for (Chars& part : split_by(step, parts[i], first && i == 0)) next.push_back(std::move(part));
      parts = std::move(next);
    }
    return parts;
  }

  static std::vector<Chars> split_by(const Json& step, Chars text, bool first) {
    const std::string kind = kind_of(step);
    if (text.empty()) return {};
    if (kind == "WhitespaceSplit") return cut(text, spans_where(text, is_space), "Removed");
    if (kind == "BertPreTokenizer") {
      std::vector<Chars> parts;
      for (const Chars& word : cut(text, spans_where(text, is_space), "Removed"))
        for (Chars& part : cut(word, spans_where(word, is_punctuation), "Isolated")) parts.push_back(std::move(part));
      return parts;
    }
    if (kind == "Punctuation") return cut(text, spans_where(text, is_punctuation), step.value("behavior", "Isolated"));
    if (kind == "Digits")
      return cut(text, spans_where(text, is_number), step.value("individual_digits", false) ? "Isolated" : "Contiguous");
    if (kind == "Metaspace") {
      const Chars mark = chars_of(step.at("replacement").get<std::string>());
      replace_all(text, U" ", mark);
      const std::string scheme = step.value("prepend_scheme", "always");
      const bool wanted = scheme == "always" || (scheme == "first" && first);
      if (wanted && !text.starts_with(mark)) text = mark + text;
      if (!step.value("split", true)) return {text};
      return cut(text, spans_where(text, [&mark](char32_t c) { return c == mark.front(); }), "MergedWithNext");
    }
    if (kind == "ByteLevel") {
      if (step.value("add_prefix_space", true) && !text.starts_with(U' ')) text = U' ' + text;
      std::vector<Chars> parts = {text};
      if (step.value("use_regex", true)) parts = cut(text, Pattern::gpt2().spans(text), "Isolated");
      for (Chars& part : parts) {
        Chars bytes;
        for (const char byte : utf8_of(part)) bytes += char_of_byte(static_cast<unsigned char>(byte));
        part = bytes;
      }
      return parts;
    }
    if (kind == "Split") {
      const Json& pattern = step.at("pattern");
      std::vector<Span> spans = pattern.contains("Regex") ? Pattern::known(pattern["Regex"].get<std::string>()).spans(text)
                                                          : spans_of(text, chars_of(pattern.at("String").get<std::string>()));
      if (step.value("invert", false))
        for (Span& span : spans) span.match = !span.match;
      return cut(text, spans, step.value("behavior", "Isolated"));
    }
    unknown_part("the pre-tokenizer " + kind);
  }

  static std::vector<Span> spans_of(const Chars& text, const Chars& wanted) {
    std::vector<Span> spans;
    std::size_t from = 0;
    for (std::size_t at = 0; !wanted.empty() && (at = text.find(wanted, at)) != Chars::npos; from = at) {
      spans.push_back({from, at, false});
      spans.push_back({at, at + wanted.size(), true});
      at += wanted.size();
    }
    spans.push_back({from, text.size(), false});
    return spans;
  }

  void add_word(const Chars& word, std::vector<Token>& ids) const {
    if (kind_ == "WordLevel") {
      const auto found = words_.find(utf8_of(word));
      if (found != words_.end()) {
        ids.push_back(found->second);
      } else if (unknown_) {
        ids.push_back(*unknown_);
      }
    } else if (kind_ == "WordPiece") {
      add_pieces(word, ids);
    } else if (kind_ == "BPE") {
      add_merged(word, ids);
    } else {
      add_likeliest(word, ids);
    }
  }

  // The longest piece that there is, then the longest that goes on from there; a word that is not all pieces is unknown.
  void add_pieces(const Chars& word, std::vector<Token>& ids) const {
    std::vector<Token> found;
    bool whole = word.size() <= longest_;
    for (std::size_t from = 0; whole && from < word.size();) {
      std::size_t to = word.size();
      auto at = words_.end();
      for (; to > from; --to) {
        at = words_.find((from > 0 ? within_ : std::string()) + utf8_of(std::u32string_view(word).substr(from, to - from)));
        if (at != words_.end()) break;
      }
      whole = to > from;
      if (whole) found.push_back(at->second);
      from = to;
    }
    if (whole) {
      ids.insert(ids.end(), found.begin(), found.end());
    } else if (unknown_) {
      ids.push_back(*unknown_);
    }
  }

  bool add_bytes(const std::string& text, std::vector<Token>& ids) const {
    std::vector<Token> found;
    for (const char c : text) {
      std::array<char, 8> name{};
      std::snprintf(name.data(), name.size(), "<0x%02X>", static_cast<unsigned>(static_cast<unsigned char>(c)));
      const auto at = words_.find(name.data());
      if (at == words_.end()) return false;
      found.push_back(at->second);
    }
    ids.insert(ids.end(), found.begin(), found.end());
    return true;
  }

  void add_merged(const Chars& word, std::vector<Token>& ids) const {
    if (ignore_merges_) {
      const auto whole = words_.find(utf8_of(word));
      if (whole != words_.end()) {
        ids.push_back(whole->second);
        return;
      }
    }
    std::vector<Token> symbols;
    bool after_unknown = false;
    for (const char32_t c : word) {
      const std::string text = utf8_of({&c, 1});
      const auto found = words_.find(text);
      const bool known = found != words_.end();
      if (known) {
        symbols.push_back(found->second);
      } else if (!(byte_fallback_ && add_bytes(text, symbols)) && unknown_) {
        if (!(fuse_unknown_ && after_unknown)) symbols.push_back(*unknown_);
        after_unknown = true;
        continue;
      }
      after_unknown = false;
    }
    merge(symbols);
    ids.insert(ids.end(), symbols.begin(), symbols.end());
  }

  // The pair of the lowest rank is merged, the leftmost of equals, until no pair is left.
  void merge(std::vector<Token>& symbols) const {
    struct Candidate {
      std::size_t rank, at, right;
      Token a, b, made;
      bool operator>(const Candidate& other) const { return std::tie(rank, at) > std::tie(other.rank, other.at); }
    };
    const std::size_t none = symbols.size();
    std::vector<std::size_t> before(none), after(none);
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
    const auto consider = [&](std::size_t at) {
      if (at == none || after[at] == none) return;
      const auto found = merges_.find({symbols[at], symbols[after[at]]});
      if (found == merges_.end()) return;
      queue.push({found->second.rank, at, after[at], symbols[at], symbols[after[at]], found->second.made});
    };
    for (std::size_t i = 0; i < none; ++i) {
      before[i] = i == 0 ? none : i - 1;
      after[i] = i + 1;
    }
    for (std::size_t i = 0; i < none; ++i) consider(i);
    std::vector<bool> gone(none, false);
    while (!queue.empty()) {
      const Candidate best = queue.top();
      queue.pop();
      if (gone[best.at] || gone[best.right] || after[best.at] != best.right || symbols[best.at] != best.a ||
          symbols[best.right] != best.b)
        continue;
      symbols[best.at] = best.made;
      gone[best.right] = true;
      after[best.at] = after[best.right];
      if (after[best.at] != none) before[after[best.at]] = best.at;
      consider(best.at);
      consider(before[best.at]);
    }
    std::vector<Token> left;
    for (std::size_t i = 0; i < none; ++i)
      if (!gone[i]) left.push_back(symbols[i]);
    symbols = std::move(left);
  }

  // The pieces whose scores add up to most (Viterbi); a character in no piece scores 10 below the least.
  void add_likeliest(const Chars& word, std::vector<Token>& ids) const {
    const std::size_t size = word.size();
    std::vector<double> best(size + 1, -std::numeric_limits<double>::infinity());
    std::vector<std::size_t> from(size + 1, 0);
    std::vector<bool> known(size + 1, false);
    best[0] = 0;
    for (std::size_t i = 0; i < size; ++i) {
      bool single = false;
      std::string piece;
      for (std::size_t end = i + 1; end <= size && end - i <= longest_; ++end) {
        append_utf8(piece, word[end - 1]);
        const auto found = words_.find(piece);
        if (found == words_.end()) continue;
        const double score = best[i] + scores_[static_cast<std::size_t>(found->second)];
        single |= end == i + 1;
        if (score > best[end]) {
          best[end] = score;
          from[end] = i;
          known[end] = true;
        }
      }
      const double score = best[i] + least_score_ - 10;
      if (!single && score > best[i + 1]) {
        best[i + 1] = score;
        from[i + 1] = i;
        known[i + 1] = false;
      }
    }
    std::vector<std::pair<Chars, bool>> pieces;
    for (std::size_t end = size; end > 0; end = from[end]) {
      const Chars piece = word.substr(from[end], end - from[end]);
      if (!known[end] && !pieces.empty() && !pieces.back().second) {
        pieces.back().first = piece + pieces.back().first;  // what is unknown is one piece
      } else {
        pieces.emplace_back(piece, known[end]);
      }
    }
    for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
      const std::string text = utf8_of(piece->first);
      const auto found = words_.find(text);
      if (found != words_.end()) {
        ids.push_back(found->second);
      } else if (!(byte_fallback_ && add_bytes(text, ids)) && unknown_) {
        ids.push_back(*unknown_);
      }
    }
  }

  std::vector<std::string> decoded(const Json& step, std::vector<std::string> parts) const {
    const std::string kind = kind_of(step);
    if (kind == "Metaspace") {
      const Chars mark = chars_of(step.at("replacement").get<std::string>());
      const bool drops = step.value("prepend_scheme", "always") != "never";
      for (std::size_t i = 0; i < parts.size(); ++i) {
        Chars text = chars_of(parts[i]);
        replace_all(text, mark, i == 0 && drops ? U"" : U" ");
        parts[i] = utf8_of(text);
      }
    } else if (kind == "ByteLevel") {
      std::string bytes;
      for (const std::string& part : parts) {
        std::string own;
        for (const char32_t c : chars_of(part)) {
          const auto byte = bytes_.find(c);
          if (byte == bytes_.end()) {
            own = part;
            break;
          }
          own += byte->second;
        }
        bytes += own;
      }
      parts = {utf8_of(chars_of(bytes))};
    } else if (kind == "WordPiece") {
      const std::string prefix = step.value("prefix", "##");
      for (std::size_t i = 0; i < parts.size(); ++i) {
        if (i > 0) parts[i] = parts[i].starts_with(prefix) ? parts[i].substr(prefix.size()) : " " + parts[i];
        if (step.value("cleanup", true)) parts[i] = tidied(std::move(parts[i]));
      }
    } else if (kind == "ByteFallback") {
      parts = with_bytes_joined(parts);
    } else if (kind == "Replace" && step.at("pattern").contains("String")) {
      const Chars from = chars_of(step["pattern"]["String"].get<std::string>());
      const Chars to = chars_of(step.at("content").get<std::string>());
      for (std::string& part : parts) {
        Chars text = chars_of(part);
        replace_all(text, from, to);
        part = utf8_of(text);
      }
    } else if (kind == "Fuse") {
      std::string whole;
      for (const std::string& part : parts) whole += part;
      parts = {whole};
    } else if (kind == "Strip") {
      const char32_t mark = chars_of(step.at("content").get<std::string>()).at(0);
      for (std::string& part : parts) {
        Chars text = chars_of(part);
        for (auto n = step.at("start").get<std::size_t>(); n > 0 && text.starts_with(mark); --n) text.erase(0, 1);
        for (auto n = step.at("stop").get<std::size_t>(); n > 0 && text.ends_with(mark); --n) text.pop_back();
        part = utf8_of(text);
      }
    } else {
      unknown_part("the decoder " + kind);
    }
    return parts;
  }

  // English without the spaces that cutting at signs put in.
  static std::string tidied(std::string text) {
    static const std::pair<const char*, const char*> changes[] = {{" .", "."},     {" ?", "?"},     {" !", "!"},           {" ,", ","},
                                                                  {" ' ", "'"},    {" n't", "n't"}, {" 'm", "'m"},         {" do not", " don't"},
                                                                  {" 's", "'s"},   {" 've", "'ve"}, {" 're", "'re"}};
    for (const auto& [from, to] : changes) {
      Chars chars = chars_of(text);
      replace_all(chars, chars_of(from), chars_of(to));
      text = utf8_of(chars);
    }
    return text;
  }

  // Runs of <0x..> tokens as the text of their bytes; one U+FFFD a token where that is no UTF-8.
  static std::vector<std::string> with_bytes_joined(const std::vector<std::string>& parts) {
    std::vector<std::string> out;
    std::string run;
    const auto flush = [&] {
      bool whole = true;
      chars_of(run, &whole);
      if (whole && !run.empty()) out.push_back(run);
      for (std::size_t i = 0; !whole && i < run.size(); ++i) out.push_back(utf8_of({&kReplacement, 1}));
      run.clear();
    };
    for (const std::string& part : parts) {
      unsigned byte = 0;
      if (part.size() == 6 && std::sscanf(part.c_str(), "<0x%2X>", &byte) == 1 && part.back() == '>') {
        run += static_cast<char>(static_cast<unsigned char>(byte));
      } else {
        flush();
        out.push_back(part);
      }
    }
    flush();
    return out;
  }

  struct PairHash {
    std::size_t operator()(const std::pair<Token, Token>& pair) const {
      return std::hash<Token>()(pair.first * 1'000'003 + pair.second);
    }
  };

  Json file_;
  std::string kind_, within_;
  Words words_;
  std::unordered_map<Token, std::string> spelling_;
  std::unordered_set<Token> special_;
  std::vector<Added> raw_, normalized_;
  std::vector<Json> normalizer_, splitter_, decoder_;
  std::unordered_map<std::pair<Token, Token>, Merge, PairHash> merges_;
  std::unordered_map<char32_t, char> bytes_;
  std::vector<double> scores_;
  double least_score_ = 0;
  std::size_t longest_ = 0;
  std::optional<Token> unknown_;
  bool byte_fallback_ = false, fuse_unknown_ = false, ignore_merges_ = false;
};
